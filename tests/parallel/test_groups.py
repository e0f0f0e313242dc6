"""What a process is told of the world that it was started in."""

import pytest

from gigatrain.errors import RunError
from gigatrain.parallel import groups


@pytest.mark.parametrize("said", ["a", "-1", "0", "2.5", "²"])
def test_a_count_of_ranks_that_is_none_is_refused(said):
    with pytest.raises(RunError, match="WORLD_SIZE is .* and no count of ranks; torchrun and train.nproc set it, or unset it"):
        groups.started({"WORLD_SIZE": said})


def test_ranks_are_counted_over_all_replicas():
    assert groups.started({}) is None
    assert groups.started({"WORLD_SIZE": "8"}) == 8
    replica = {groups.REPLICA: "1/4", groups.QUORUM: "127.0.0.1:1", groups.TOKEN: "token"}
    assert groups.started({"WORLD_SIZE": "2"} | replica) == 8
