"""Runs of vLLM's `LLM` on the CPU, one engine after the other in this process; in the environment of the engines.

    .venv-engines/bin/python benchmarks/vllm_runs.py JOB.json ANSWER.json

JOB: {"model", "prompts": [[token id]], "max_tokens", "batches": [1, 8], "repeats", "runs": {name: {"speculative":
{…} | null, "tensor_parallel_size": 1}}}. ANSWER: {"vllm": version, "runs": {name: {"tokens": of each prompt,
"seconds": {batch: the fastest}, "drafts": {"rounds", "drafted", "accepted", "by_position"}}}}.

It imports nothing of ee_tuning, which that environment lacks.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is half of the memory
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # runs the engine in this process, which starts three times as fast
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(job_file: str, answer_file: str) -> None:
    """Runs the job and writes the answer."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    ranks = max(run.get("tensor_parallel_size", 1) for run in job["runs"].values())
    settings = {**SETTINGS, **({"VLLM_CPU_OMP_THREADS_BIND": cores_by_rank(ranks)} if ranks > 1 else {})}
    os.environ |= {key: value for key, value in settings.items() if key not in os.environ}
    import vllm

    runs = {name: measured(job, run) for name, run in job["runs"].items()}
    answer = {"vllm": vllm.__version__, "runs": runs}
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


def cores_by_rank(ranks: int) -> str:
    """Returns the cores of each rank's threads: vLLM determines them by itself only where each rank has a NUMA node."""
    cores = sorted(os.sched_getaffinity(0))
    parts = [cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks] for rank in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)


def measured(job: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Runs one engine: returns the tokens of every prompt, the fastest time of each batch size, and the counters of
    drafts.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    more = {} if run.get("speculative") is None else {"speculative_config": run["speculative"]}
    engine = LLM(
        model=job["model"],
        dtype="float32",
        max_model_len=job.get("max_model_len", 512),
        max_num_seqs=8,
        disable_log_stats=False,
        enable_prefix_caching=False,
        tensor_parallel_size=run.get("tensor_parallel_size", 1),
        enforce_eager=job.get("enforce_eager", False),
        **more,
    )
    wanted = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    seconds = {str(batch): float("inf") for batch in job["batches"]}
    engine.generate(prompts[:1], wanted, use_tqdm=False)  # the first call compiles
    before = drafts(engine)
    for _ in range(job.get("repeats", 1)):
        for batch in job["batches"]:
            began, tokens = time.perf_counter(), list[list[int]]()
            for start in range(0, len(prompts), batch):
                outputs = engine.generate(prompts[start : start + batch], wanted, use_tqdm=False)
                tokens += [list(output.outputs[0].token_ids) for output in outputs]
            seconds[str(batch)] = min(seconds[str(batch)], time.perf_counter() - began)
    after = drafts(engine)
    engine.llm_engine.engine_core.shutdown()
    del engine
    cleanup_dist_env_and_memory()
    gc.collect()
    return {"tokens": tokens, "seconds": seconds, "drafts": since(before, after)}


def drafts(engine: Any) -> dict[str, Any]:
    """Returns vLLM's counters of drafts so far; empty without drafts."""
    names = {
        "vllm:spec_decode_num_drafts": "rounds",
        "vllm:spec_decode_num_draft_tokens": "drafted",
        "vllm:spec_decode_num_accepted_tokens": "accepted",
        "vllm:spec_decode_num_accepted_tokens_per_pos": "by_position",
    }
    found = {names[metric.name]: metric for metric in engine.get_metrics() if metric.name in names}
    return {name: list(metric.values) if name == "by_position" else metric.value for name, metric in found.items()}


def since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Returns the counts between two readings."""
    return {
        name: [new - old for new, old in zip(value, before[name], strict=True)]
        if isinstance(value, list)
        else value - before[name]
        for name, value in after.items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
