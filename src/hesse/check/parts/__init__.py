"""The parts of a pass, judged one by one: what is wrong with which, and why."""
