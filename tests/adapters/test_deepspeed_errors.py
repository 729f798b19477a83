"""Bad input: one LcabError that names value and fix, the same on every rank, and no hang."""

from __future__ import annotations

from pathlib import Path

from tests.adapters.launch import launch

WORDS = {
    "kernels differ": ["ranks disagree", "sdpa_math", "naive"],
    "accumulation differs": ["ranks disagree", "gradient_accumulation_steps"],
    "one rank misspells": ["rank 1", "kernal", "'kernel'"],
    "models differ": ["ranks disagree on the model"],
    "unknown key": ['"lcab"', "kernal", "did you mean 'kernel'"],
    "unknown kernel": ["sdpa_flsh", "did you mean 'sdpa_flash'"],
    "unknown strategy": ["ulyses", "did you mean 'ulysses'"],
    "unknown layout": ["zigzg", "did you mean 'zigzag'"],
    "unknown mask": ["casual", "did you mean 'causal'"],
    "section is a list": ['"lcab"', "must be an object"],
    "world does not divide": ["2 ranks", "groups of 4"],
    "sequence_parallel_size differs": ["sequence_parallel_size is 1", "takes 2"],
    "sequence_parallel_size without strategy": ["sequence_parallel_size is 2", "'none'"],
    "sequence_parallel_size is text": ["sequence_parallel_size 'auto'"],
    "data_parallel_size differs": ["data_parallel_size is 2", "make 1"],
    "train_batch_size counts the world": ["train_batch_size 8", "1 data-parallel groups"],
    "batch does not divide": ["train_batch_size 7", "a multiple of 2"],
    "own mpu": ["mpu or mesh_param cannot be given"],
    "own mesh": ["mpu or mesh_param cannot be given"],
    "no config": ["give the DeepSpeed config once"],
    "two configs": ["give the DeepSpeed config once"],
    "no file": ["no/such/ds_config.json"],
    "no slot": ["TinyGPT has no attention slot", "lcab_plugin.Attention()"],
    "predivide": ["gradient_predivide_factor cannot be given"],
    "small bucket": ["reduce_bucket_size 1000 is less than", "set it to 2048"],
    "experts": ["mixture-of-experts"],
    "lamb": ["Lamb", "compiles"],
    "heads": ["1 "],
    "mask of another length": ["12"],
    "number of micro-batches": ["1 of 2 ranks", "gradient_accumulation_steps = 2"],
    "weights for a mask": ["other than 0 and 1"],
    "all masked": ["every token"],
    "too many losses": ["more often than the window has micro-batches (2)"],
    "shape of losses": ["(5,)", "(4,)"],
    "losses for a count": ["only a count"],
    "counted otherwise": ["cover 8 tokens", "6"],
    "attention dropout": ["distributed has p = 0.1", "set attention dropout to 0"],
    "attention with parameters": ["has parameters"],
    "sequence first": ["gather_idx 0"],
    "DistributedAttention without layout": ['"layout": "contiguous"'],
    "DistributedAttention with any layout": ['"layout": "contiguous"'],
    "auto for nothing known": ["kernel 'auto' and strategy 'auto'", "workload=planner.Workload(mask, heads"],
    "auto for other heads": ['ranks disagree on the workload of "auto"', "'heads': 4"],
    "auto without a kernel": ["no kernel of this machine serves", "and softcap"],
    "family needs lengths": ["causal_document", "mask="],
    "further arguments": ["1 further arguments (Tensor)"],
}


def test_every_rank_raises_the_same_error(tmp_path: Path) -> None:
    first, second = launch("torchrun", 2, "errors", list(WORDS), tmp_path).ranks
    missing = {
        name: first.get(name)
        for name, words in WORDS.items()
        if not all(w in first.get(name, "") for w in words)
    }
    assert missing == {}
    assert first == second
