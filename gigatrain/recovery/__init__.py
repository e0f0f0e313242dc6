"""What keeps a run alive on a node: ranks are watched, and started again where one dies or hangs. Free of torch.

`supervisor` starts and watches, `standby` forks ranks from a process that has imported everything, `board` is where ranks say how far they are, `lookout` sees
it, `stuck` judges it, `meeting` is what ranks need to find each other.
"""
