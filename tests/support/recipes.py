"""Settings that make a run of a script a matter of seconds."""

from hf_deit import DataArguments, DistillationConfig, ModelArguments


KINDS = (ModelArguments, DataArguments, DistillationConfig)
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


SHORT = {
    **TINY,
    "max_steps": 2,
    "max_train_samples": 64,
    "max_eval_samples": 8,
    "per_device_train_batch_size": 8,
    "use_cpu": "true",
    "disable_tqdm": "true",
    "dataloader_num_workers": 0,
    "eval_strategy": "no",
    "save_strategy": "no",
}
