"""Distribution of prompts over the replicas of a model (data parallelism), with results in the order of the prompts on
every rank.

The ranks of a replica, tensor × pipeline, decode together and have the same results; those of one rank per replica are
taken.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from ee_tuning.errors import InputError
from ee_tuning.parallel.collectives import gather_lists
from ee_tuning.parallel.reports import failure_of_rank
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
    is_refusal = isinstance(failure, InputError)
    told = None if failure is None else failure_of_rank(failure, topology.rank)
    speaks = topology.stage == 0 and topology.tp_rank == 0
    answers = gather_lists([(topology.dp_rank, results if speaks else None, told, is_refusal)], topology)
    for _, _, reason, refused in answers:
        if reason is not None:
            raise failure if failure is not None else InputError(reason) if refused else RuntimeError(reason)
    parts = {replica: made for replica, made, _, _ in answers if made is not None}
    found = {
        place: made for replica, places in enumerate(shares) for place, made in zip(places, parts[replica], strict=True)
    }
    return [found[place] for place in range(len(items))]
