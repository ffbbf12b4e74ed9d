"""What users of other programs call the recipe's keys, for the message about a key that is not known."""

TRANSFORMERS_NAMES = {
    # of transformers.TrainingArguments (5.x) and its examples: the key here
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "dataloader_num_workers": "data.num_workers",
    "dataloader_prefetch_factor": "data.prefetch_batches",
    "ddp_timeout": "training.collective_timeout_minutes",
    "eval_steps": "validation.every_steps",
    "gradient_accumulation_steps": "training.global_batch_tokens",
    "gradient_checkpointing": "training.activation_checkpointing",
    "learning_rate": "optimizer.lr",
    "logging_steps": "logging.log_every_steps",
    "lr_scheduler_type": "schedule.schedule",
    "model_name_or_path": "training.initial_weights",
    "num_train_epochs": "training.max_tokens",
    "optim": "optimizer.name",
    "per_device_train_batch_size": "training.micro_batch_samples",
    "report_to": "logging.wandb",
    "run_name": "logging.wandb_name",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "torch_compile": "training.compile",
    "warmup_ratio": "schedule.warmup_steps",
}
