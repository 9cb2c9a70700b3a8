"""Whether a network's answers speak for labels, for another order of them, or against both."""

import pytest
import torch

from bdclean.data.labels.agreement import agreement, named_orders

NUMBERS = [str(k) for k in range(12)]


def answers(truth: torch.Tensor, accuracy: float, classes: int, generator: torch.Generator) -> torch.Tensor:
    """Of a network that is right on `accuracy` of the images and answers anything on others."""
    right = torch.rand(len(truth), generator=generator) < accuracy
    return torch.where(right, truth, torch.randint(classes, truth.shape, generator=generator))


def test_text_order_is_found_and_is_only_one_of_the_named():
    orders = named_orders(NUMBERS, range(12), 12)
    places = orders["text order, as torchvision's ImageFolder sorts"]
    assert places.tolist() == [sorted(NUMBERS).index(name) for name in NUMBERS]
    assert len(orders) == 1  # by number is the order that they are in, and from 1 the head has no place for 0
    from_one = named_orders([str(k) for k in range(1, 13)], range(12), 13)
    assert "their numbers, from 0" in from_one and "their numbers, from 1" not in from_one


@pytest.mark.parametrize("n", [20, 60, 200, 1000])
def test_labels_in_torchvisions_order_are_put_into_it(n):
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) % 12
    places = torch.tensor([sorted(NUMBERS).index(name) for name in NUMBERS])
    said = agreement(answers(places[labels], 0.95, 12, generator), labels, NUMBERS, 12)
    assert said.verdict == "order" and said.order.startswith("text order")
    assert said.best > 0.8 and said.right < 0.4
    assert torch.equal(said.places, places)


def test_an_order_without_a_name_is_a_matching_though_a_few_classes_are_in_their_place():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 12
    moved = torch.arange(12)
    moved[4:] = moved[4:].roll(3)  # 4 of 12 stay: the accuracy is far above chance
    said = agreement(answers(moved[labels], 0.93, 12, generator), labels, None, 12)
    assert said.verdict == "matching" and 0.3 < said.right < 0.4 and said.best > 0.85
    two = agreement(answers(1 - labels % 2, 0.97, 2, generator), labels % 2, ["cat", "dog"], 2)
    assert two.verdict == "matching"


def test_a_few_classes_above_chance_do_not_speak_for_all():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 12
    spread = torch.where(labels < 4, labels, torch.randint(12, labels.shape, generator=generator))
    assert agreement(spread, labels, None, 12).verdict in ("few classes", "agrees")
    never = torch.where(labels < 4, labels, torch.randint(4, labels.shape, generator=generator))
    assert agreement(never, labels, None, 12).verdict == "few classes"
    assert agreement(never, labels, None, 12, sure=True).verdict == "agrees"


@pytest.mark.parametrize(
    ("classes", "n", "accuracy", "least"),
    [(10, 200, 0.3, 50), (43, 200, 0.3, 50), (10, 20, 0.95, 50), (2, 60, 0.95, 50), (12, 60, 0.3, 45)],
)
def test_true_labels_of_bad_networks_and_small_sets_are_kept(classes, n, accuracy, least):
    """Of 50 draws each, a class without an image among them."""
    generator = torch.Generator().manual_seed(0)
    kept = 0
    for _ in range(50):
        labels = torch.randint(max(2, classes - 1), (n,), generator=generator)
        names = [str(k) for k in range(classes)]
        said = agreement(answers(labels, accuracy, classes, generator), labels, names, classes)
        kept += said.verdict == "agrees"
        assert said.verdict not in ("order", "matching")
    assert kept >= least


def test_images_of_other_classes_are_no_labels():
    """Each foreign class goes to a few answers, which is what networks do with them."""
    torch.manual_seed(0)
    agreed = 0
    for _ in range(50):
        labels = torch.randint(10, (200,))
        habits = torch.distributions.Dirichlet(torch.full((10,), 0.15)).sample((10,))
        found = torch.multinomial(habits[labels], 1).flatten()
        agreed += agreement(found, labels, [f"kind {k}" for k in range(10)], 10).verdict == "agrees"
    assert agreed <= 2


def test_a_share_is_nearer_to_chance_only_where_that_is_sure():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (200,), generator=generator)
    found = torch.randint(10, (200,), generator=generator)
    said = agreement(found, labels, None, 10)
    assert said.verdict == "chance" and said.nearer_chance
    few = agreement(found[:5], found[:5].where(torch.tensor([1, 1, 0, 0, 0]) > 0, labels[:5]), None, 10)
    assert few.verdict == "chance" and not few.nearer_chance
