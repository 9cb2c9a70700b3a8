"""bdclean, which saves its resume state after every step, and of whose processes one ends in the middle of it.

`dying.py STATE.json RANK STEP SIGNAL ARGUMENTS...`: once the state on disk has reached the step, the process of that
rank gets the signal. With an empty RANK none does.
"""

import json
import os
import sys
import threading
import time

import bdclean.training.resume
from bdclean.__main__ import main

state, rank, step, number = sys.argv[1:5]
del sys.argv[1:5]
bdclean.training.resume.SAVE_EVERY_SECONDS = -1.0


def watch():
    while True:
        try:
            with open(state) as file:
                if json.load(file)["done"] >= int(step):
                    os.kill(os.getpid(), int(number))
                    return
        except (OSError, ValueError):
            pass
        time.sleep(0.01)


if os.environ["RANK"] == rank:
    threading.Thread(target=watch, daemon=True).start()
main()
