"""What a cleansing leaves behind: one file for each question, each of which works on copies of a network."""
