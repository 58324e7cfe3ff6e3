"""Distribution of prompts over the replicas of a model (data parallelism), with results in the order of the prompts on
every rank.

The ranks of a replica, tensor × pipeline, decode together and have the same results; those of one rank per replica are
taken.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from ee_tuning.parallel.collectives import RankFailure, gather_lists
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.work_partition import share_of

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_replicas(
    items: Sequence[Item],
    action: Callable[[list[Item]], list[Result]],
    topology: Topology,
    *,
    work: Callable[[Item], int] | None = None,
) -> list[Result]:
    """Returns the results of `action`, one per item, in the order of the items, on every rank. All ranks call it with
    the same items.

    Replica r gets items r, r + dp, … , or, if `work` estimates the cost of an item, a share of about equal cost. A
    replica without items does nothing. Where `action` fails on one rank all raise: its InputError, or else its own
    exception there and a RuntimeError on the others.
    """
    results, failure = list[Result](), None
    shares = [
        list(range(len(items)))[replica :: topology.dp]
        if work is None
        else share_of({place: work(item) for place, item in enumerate(items)}, replica, topology.dp)
        for replica in range(topology.dp)
    ]
    share = [items[place] for place in shares[topology.dp_rank]]
    try:
        results = action(share) if share else []
        assert len(results) == len(share), (len(results), len(share))
    except Exception as error:  # any exception: the other replicas wait for an answer
        failure = error
    if topology.world_size == 1:
        if failure is not None:
            raise failure
        return results
    own = results if topology.stage == 0 and topology.tp_rank == 0 else None
    answers = gather_lists([(topology.dp_rank, own, RankFailure.of(failure, topology.rank))], topology)
    for _, _, reported in answers:
        if reported is not None:
            raise reported.error() if failure is None else failure
    parts = {replica: made for replica, made, _ in answers if made is not None}
    found = {
        place: made for replica, places in enumerate(shares) for place, made in zip(places, parts[replica], strict=True)
    }
    return [found[place] for place in range(len(items))]
