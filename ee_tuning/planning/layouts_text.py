"""`ee-tuning plan --cluster`: prints the layouts of a cluster, with the reasons for the choice, as text or as one JSON
object.
"""

from typing import Any

from ee_tuning.config import Config
from ee_tuning.json_file import to_json
from ee_tuning.planning.layouts import Layout
from ee_tuning.planning.plan import TuningPlan
from ee_tuning.planning.report import plan_tree, print_plan
from ee_tuning.text_table import table_lines

_REFUSAL_CHARACTERS = 110
_SHOWN = 24


def print_layouts(config: Config, found: list[Layout], *, as_json: bool) -> bool:
    """Prints the layouts, best first, and the plan of the first; returns whether it fits."""
    best = found[0]
    assert best.plan is not None
    if as_json:
        chosen = {**_tree(best), "why": _reasons(found), "plan": plan_tree(best.plan)}
        print(to_json({"chosen": chosen, "layouts": list(map(_tree, found))}, indent=2))
        return best.fits
    cluster = best.plan.cluster
    print(f"layouts of {cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu.name}, best first:\n")
    print("\n".join(_table(found)))
    print(
        "\nGB at the most on a GPU; ms of the slowest stage's micro-batch, and which share of it messages of tensor parallelism take; "
        "the largest idle share of a stage; ms of the update\n"
    )
    name = f"tensor {best.tensor} × pipeline {best.pipeline} × data {best.data}"
    print(f"chosen: {name}" if best.fits else f"none fits; nearest is {name}")
    print("\n".join(f"  {reason}" for reason in _reasons(found)), end="\n\n")
    return print_plan(config, best.plan, is_smallest=False, as_json=False)


def _tree(layout: Layout) -> dict[str, Any]:
    told = {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data, "fits": layout.fits}
    if layout.plan is None:
        return {**told, "refusal": layout.refusal}
    plan = layout.plan
    return {
        **told,
        "bytes": _most_bytes(plan),
        "step_seconds": plan.step_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "hours": plan.hours,
    }


def _reasons(found: list[Layout]) -> list[str]:
    """Returns the reasons for the choice of the first layout."""
    best, fitting = found[0], [each for each in found if each.fits]
    if not fitting:
        return [
            "every layout needs more memory than a GPU has: take larger GPUs or more of them, or make the job smaller"
        ]
    assert best.plan is not None
    planned = [each for each in found if each.plan is not None]
    alone = f"the only layout that fits, of {len(found)}"
    reasons = [alone if len(fitting) == 1 else f"the fastest of {len(fitting)} layouts that fit, of {len(found)}"]
    for size in ("tensor", "pipeline"):
        smaller = [each for each in planned if _is_smaller(each, best, size)]
        if getattr(best, size) == 1 or not smaller:
            continue
        nearest = max(smaller, key=lambda each: getattr(each, size))
        reasons.append(f"{size} {getattr(nearest, size)} in its place {_compared(nearest, best)}")
    if len(fitting) > 1:
        second = fitting[1]
        reasons.append(
            f"next best: tensor {second.tensor} × pipeline {second.pipeline} × data {second.data}, which {_compared(second, best)}"
        )
    return reasons


def _is_smaller(each: Layout, best: Layout, size: str) -> bool:
    other = "pipeline" if size == "tensor" else "tensor"
    return getattr(each, size) < getattr(best, size) and getattr(each, other) == getattr(best, other)


def _compared(each: Layout, best: Layout) -> str:
    assert each.plan is not None and best.plan is not None
    if not each.fits:
        return f"does not fit: {_most_bytes(each.plan) / 1e9:.0f} GB"
    more = each.plan.hours / best.plan.hours - 1
    return f"takes {more:.1%} longer, with {_most_bytes(each.plan) / 1e9:.0f} GB at the most, not {_most_bytes(best.plan) / 1e9:.0f}"


def _most_bytes(plan: TuningPlan) -> int:
    return max(plan.fit_bytes, *(each.total_bytes for each in plan.stages))


def _table(found: list[Layout]) -> list[str]:
    head = ["tensor", "pipeline", "data", "GB", "", "ms/micro-batch", "messages", "idle", "update", "step, s", "hours"]
    shown = [each for each in found if each.plan is not None][:_SHOWN]
    lines = table_lines(head, [_row(each) for each in shown])
    for each in found:
        if each.plan is None:
            lines.append(f"{each.tensor} × {each.pipeline} × {each.data}: {each.refusal[:_REFUSAL_CHARACTERS]}")
    return lines


def _row(layout: Layout) -> list[str]:
    plan = layout.plan
    assert plan is not None
    slowest = max(plan.stages, key=lambda each: each.micro_batch)
    return [
        *map(str, (layout.tensor, layout.pipeline, layout.data)),
        f"{_most_bytes(plan) / 1e9:.1f}",
        "fits" if layout.fits else "no",
        f"{slowest.micro_batch * 1e3:.0f}",
        f"{slowest.message_share:.0%}",
        f"{max(each.idle_share for each in plan.stages):.0%}",
        f"{max(each.update for each in plan.stages) * 1e3:.0f}",
        f"{plan.step_seconds:.2f}",
        f"{plan.hours:.1f}",
    ]
