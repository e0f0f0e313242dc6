"""Whether a node can train: checks of one machine, of the links between machines, and the judgement over all of them. `examine.examine` is the story."""
