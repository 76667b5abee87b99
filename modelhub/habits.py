"""Names that people bring along from Keras, transformers, PEFT and TRL, and what they are called here.

`explained` turns Python's bare TypeError about a call into one that says what to write; `Habits` does so for all public
methods of a class. Signatures stay as they are, and a call that is right costs nothing.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

from modelhub.errors import UnknownArgument, WrongCall

T = TypeVar("T", bound=Callable[..., Any])

# {their keyword: ours}; of several the first that the call has.
KEYWORDS: dict[str, tuple[str, ...]] = {
    theirs: (ours,) if isinstance(ours, str) else tuple(ours)
    for theirs, ours in {
        # generate, chat
        "max_length": ("max_new_tokens", "sequence_length"), "max_tokens": "max_new_tokens",
        "max_gen_len": "max_new_tokens", "n_predict": "max_new_tokens", "num_predict": "max_new_tokens",
        "max_completion_tokens": "max_new_tokens", "temp": "temperature", "topk": "top_k", "topp": "top_p",
        "stop_token_ids": "stop", "stop_strings": "stop", "stop_sequences": "stop", "num_samples":
        "num_return_sequences", "n": "num_return_sequences", "best_of": "num_beams", "beam_width": "num_beams",
        "beam_size": "num_beams", "repeat_penalty": "repetition_penalty", "streamer": "stream", "return_full_text":
        "echo", "strip_prompt": "echo", "random_seed": "seed", "random_state": "seed", "inputs": ("prompt", "images"),
        "prompts": "prompt", "text": ("prompt", "texts"), "chat_template_kwargs": "template_options",
        "output_scores": "logprobs", "conversation": "messages", "num_logprobs": "logprobs",
        # compile
        "lr": "learning_rate", "lr_scheduler": "schedule", "lr_scheduler_type": "schedule", "scheduler": "schedule",
        "optim": "optimizer", "optimizers": "optimizer", "weight_decay_rate": "weight_decay", "clipnorm": "clip_norm",
        "global_clipnorm": "clip_norm", "max_grad_norm": "clip_norm", "gradient_clip_val": "clip_norm",
        "weighted_metrics": "metrics", "compute_metrics": "metrics", "jit_compile": "jit", "torch_compile": "jit",
        "run_eagerly": "jit", "gradient_checkpointing": "remat", "activation_checkpointing": "remat",
        "use_gradient_checkpointing": "remat", "fp16": "mixed_precision", "bf16": "mixed_precision",
        "precision": "mixed_precision", "label_smoothing_factor": "label_smoothing", "loss_fn": "loss",
        "loss_type": "objective",
        # fit, evaluate
        "x": ("data", "images"), "dataset": "data", "train_dataset": "data", "training_data": "data",
        "train_data": "data", "eval_dataset": "validation_data", "val_data": "validation_data",
        "eval_data": "validation_data", "validation_dataset": "validation_data", "num_epochs": "epochs",
        "num_train_epochs": "epochs", "n_epochs": "epochs", "epoch": "epochs", "max_steps": "steps",
        "steps_per_epoch": "steps", "iters": "steps", "num_steps": "steps", "train_steps": "steps",
        "per_device_train_batch_size": "batch_size", "per_device_eval_batch_size": "batch_size",
        "gradient_accumulation_steps": "grad_accum", "accumulate_grad_batches": "grad_accum",
        "accumulation_steps": "grad_accum", "resume_from_checkpoint": "resume", "output_dir":
        ("checkpoint_dir", "folder"), "ckpt_dir": "checkpoint_dir", "max_seq_length": "sequence_length",
        "max_seq_len": "sequence_length", "seq_len": "sequence_length", "seq_length": "sequence_length",
        "model_max_length": "sequence_length", "context_length": "sequence_length", "chat_template": "template",
        "formatting_func": "template", "pack": "packing", "train_on_inputs": "loss_on", "mask_prompt": "loss_on",
        "completion_only_loss": "loss_on", "assistant_only_loss": "loss_on", "data_augmentation": "augment",
        "validation_steps": "validation_data", "callback": "callbacks",
        # enable_lora
        "r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
        "target_modules": "targets", "lora_target": "targets", "adapter_name": "name", "peft_config": "rank",
        "lora_config": "rank",
        # from_preset, to
        "torch_dtype": "dtype", "compute_dtype": "dtype", "dtype_policy": "dtype", "device_map": "device",
        "load_in_4bit": "quantize", "load_in_8bit": "quantize", "quantization_config": "quantize",
        "attn_implementation": "attention", "use_auth_token": "token", "hf_token": "token", "local_files_only":
        "offline", "model_name": "preset", "pretrained_model_name_or_path": "preset", "model_id": "preset",
        "num_labels": "num_classes", "n_classes": "num_classes", "class_names": "labels", "id2label": "labels",
        "framework": "backend",
        # save, publish, convert
        "save_directory": "folder", "path": "folder", "filepath": "folder",
        "repo_id": "address", "uri": "address", "url": "address", "commit_message": "message", "license": "licence",
        "outfile": "target", "outtype": "dtype", "overwrite": "force", "top_n": "top", "topk_labels": "top",
        # optimizers, callbacks
        "beta_1": "betas", "beta_2": "betas", "epsilon": "eps", "learning_rate_schedule": "schedule",
        "num_warmup_steps": "warmup_steps", "opset_version": "opset", "early_stopping_patience": "patience",
        "metric_for_best_model": "monitor",
    }.items()
}  # fmt: skip

# {keyword: what to do}, of theirs and of ours, where the call has none like it.
ADVICE = {
    "do_sample": "temperature=, top_k=, top_p= or min_p= switch sampling on; without them it is greedy, unless "
    "the preset's generation_config says otherwise",
    "early_stopping": "give fit callbacks=[modelhub.training.EarlyStopping()]; for beams the preset's "
    "generation_config says it",
    **dict.fromkeys(
        (
            "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "min_new_tokens", "min_length", "sequence_bias",
            "typical_p", "epsilon_cutoff", "eta_cutoff", "length_penalty", "forced_eos_token_id",
            "exponential_decay_length_penalty", "encoder_repetition_penalty", "begin_suppress_tokens",
        ),
        "set the key of lm.generation_config, which all calls follow: lm.generation_config['...'] = ...",
    ),
    "pad_token_id": "prompts of several lengths need no padding",
    "eos_token_id": "lm.generation_config['eos_token_id'] holds what ends an answer; stop= takes texts",
    "use_cache": "the cache is always used",
    "return_tensors": "it takes and gives text; lm.logits(token_ids) gives logits",
    "attention_mask": "prompts of several lengths need no mask",
    "output_logits": "lm.logits(token_ids) gives logits",
    "sequence_length": "it belongs to the preprocessor: lm.preprocessor.sequence_length = 512",
    "eval_strategy": "validation_data= or validation_split= is measured after each epoch",
    "evaluation_strategy": "validation_data= or validation_split= is measured after each epoch",
    "report_to": "give callbacks=[modelhub.training.WandbLogger()], or TensorBoardLogger(folder)",
    "logging_steps": "each step is in the History that fit returns; modelhub.training.JSONLogger(file) writes it down",
    "logging_dir": "give callbacks=[modelhub.training.TensorBoardLogger(folder)]",
    "save_strategy": "checkpoint_dir= keeps checkpoints, each save_steps= steps or every two minutes",
    "save_total_limit": "the newest two checkpoints are kept",
    "load_best_model_at_end": "give callbacks=[modelhub.training.BestCheckpoint(folder)]",
    "restore_best_weights": "modelhub.training.BestCheckpoint(folder) keeps the best, and from_preset or "
    "load_adapter brings it back",
    "warmup_steps": "say it with the schedule: compile(schedule=modelhub.optim.Linear(warmup_steps=100)), or Cosine",
    "warmup_ratio": "say it with the schedule: compile(schedule=modelhub.optim.Linear(warmup_ratio=0.03)), or Cosine",
    "shuffle": "rows are shuffled anew in each epoch, in an order that seed= decides",
    "sample_weight": "all rows count alike; a loss of your own, compile(loss=...), can weigh them",
    "class_weight": "all classes count alike; a loss of your own, compile(loss=...), can weigh them",
    "y": "images and labels go together: fit((images, labels))",
    "workers": "data is read ahead by itself",
    "dataloader_num_workers": "data is read ahead by itself",
    "args": "there is no TrainingArguments: epochs=, batch_size= and so on are fit's own, learning_rate= is compile's",
    "tokenizer": "the preset's tokenizer is used; it is lm.tokenizer",
    "processing_class": "the preset's tokenizer is used; it is lm.tokenizer",
    "bias": "biases are not trained",
    "task_type": "it is known from the model",
    "modules_to_save": "give enable_lora the names of modules to train whole; a new head is one of them by itself",
    "init_lora_weights": "A starts from uniform values as in PEFT, B from zeros",
    "trust_remote_code": "code of a repository is never run; leave it out",
    "low_cpu_mem_usage": "weights are read one by one anyway; leave it out",
    "safe_serialization": "nothing but safetensors is written; leave it out",
    "use_safetensors": "nothing else is read; leave it out",
    "weights": "load_weights=False starts from random weights",
    "pretrained": "load_weights=False starts from random weights",
    "input_shape": "images are brought to the model's size; from_config(image_size=...) makes a model of another",
    "exist_ok": "a repository that is there gets a new commit",
}  # fmt: skip
# What to say besides of those that have one.
REMARKS = {
    "max_length": "It counts the answer alone, without the prompt.",
    "steps_per_epoch": "It counts the optimizer steps of the whole run.",
    "strip_prompt": "echo=False, the default, leaves the prompt out.",
    "run_eagerly": "jit=False compiles nothing.",
    "streamer": "stream=True gives an iterator over pieces of text.",
    "num_logprobs": "logprobs=True gives those of the chosen tokens.",
    "validation_steps": "All of it is measured after each epoch.",
    "peft_config": "There is no LoraConfig: enable_lora takes its values directly.",
    "lora_config": "There is no LoraConfig: enable_lora takes its values directly.",
    "weighted_metrics": "All rows count alike.",
    "local_files_only": "offline=True uses the cache alone.",
    "load_in_4bit": 'quantize="int4" is the same.',
    "load_in_8bit": 'quantize="int8" is the same.',
    "quantization_config": 'It is "int8", "int4", "keep" or {pattern: one of them}.',
    "device_map": "The whole model is on one device.",
}  # fmt: skip

# {another name of a dtype, in small letters: ours}
DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16", "fp32": "float32", "f32": "float32",
    "full": "float32", "single": "float32", "float": "float32",
}  # fmt: skip

# {their method or attribute: ours}
ATTRIBUTES = {
    "from_pretrained": "from_preset(name)",
    "save_pretrained": "save_to_preset(folder), or save_adapter(folder) for the adapter alone",
    "save": "save_to_preset(folder), or save_adapter(folder) for the adapter alone",
    "save_model": "save_to_preset(folder), or save_adapter(folder) for the adapter alone",
    "save_weights": "save_to_preset(folder)",
    "save_lora_weights": "save_adapter(folder)",
    "load_weights": "from_preset(folder), or load_params({name: array})",
    "load_lora_weights": "load_adapter(folder)",
    "push_to_hub": 'publish("hf://owner/name")',
    "upload_preset": 'publish("hf://owner/name")',
    "state_dict": "params, a dict of arrays",
    "load_state_dict": "load_params({name: array})",
    "weights": "params, a dict of arrays",
    "get_weights": "params, a dict of arrays",
    "set_weights": "load_params({name: array})",
    "parameters": "params, a dict of arrays; to_torch(lm) gives a torch.nn.Module",
    "named_parameters": "params, a dict of arrays; to_torch(lm) gives a torch.nn.Module",
    "count_params": "backbone.num_parameters",
    "num_parameters": "backbone.num_parameters",
    "get_nb_trainable_parameters": "print_trainable_parameters()",
    "generation_kwargs": "generation_config, a dict",
    "cuda": 'to(device="gpu")',
    "cpu": 'to(device="cpu")',
    "half": 'to(dtype="float16")',
    "bfloat16": 'to(dtype="bfloat16")',
    "float": 'to(dtype="float32")',
    "train": "fit(data); layers need not be switched to training, dropout is on in fit alone",
    "eval": "nothing: dropout is on in fit alone",
    "trainable": "enable_lora() or freeze_backbone(), which decide what fit trains",
    "requires_grad_": "enable_lora() or freeze_backbone(), which decide what fit trains",
    "add_adapter": "enable_lora() for a new one, or load_adapter(folder)",
    "disable_adapter": "set_adapter(None)",
    "disable_adapters": "set_adapter(None)",
    "unload": "set_adapter(None)",
    "merge_and_unload": "merge_lora()",
    "merge_adapter": "merge_lora()",
    "unmerge_adapter": "unmerge_lora()",
    "get_peft_model": "enable_lora()",
    "peft_config": "backbone.adapters, a dict",
    "gradient_checkpointing_enable": "compile(remat=True)",
    "train_on_batch": "fit(batches, steps=1)",
    "test_on_batch": "evaluate(batches)",
    "tokenize": "tokenizer.encode(text)",
    "encode": "tokenizer.encode(text)",
    "decode": "tokenizer.decode(token_ids)",
    "apply_chat_template": "chat(messages); chat_template.render(messages) gives the text",
    "preset_name": "preset",
    "compute_loss": "evaluate(data) or score(texts)",
    "predict_proba": "predict(images, top=...)",
    "to_gguf": 'modelhub.convert(preset_or_folder, "model.gguf")',
    "save_pretrained_gguf": 'modelhub.convert(preset_or_folder, "model.gguf")',
    "export": "modelhub.to_onnx, to_saved_model, to_litert or to_torch",
}

# {class: ours}
CALLBACKS = {
    "EarlyStopping": "modelhub.training.EarlyStopping",
    "EarlyStoppingCallback": "modelhub.training.EarlyStopping",
    "ModelCheckpoint": "modelhub.training.BestCheckpoint(folder), or fit(checkpoint_dir=...) to go on with a run",
    "BackupAndRestore": "fit(checkpoint_dir=...)",
    "CSVLogger": "modelhub.training.JSONLogger(file)",
    "TensorBoard": "modelhub.training.TensorBoardLogger(folder)",
    "TensorBoardCallback": "modelhub.training.TensorBoardLogger(folder)",
    "WandbCallback": "modelhub.training.WandbLogger()",
    "WandbMetricsLogger": "modelhub.training.WandbLogger()",
    "LearningRateScheduler": "compile(schedule=function of (step, total_steps))",
    "ReduceLROnPlateau": 'compile(schedule="cosine"), which lowers the rate over the run',
    "TerminateOnNaN": "nothing: fit ends by itself where the loss is no number",
    "ProgbarLogger": "nothing: fit shows its progress; modelhub.training.ProgressBar is the callback",
    "ProgressCallback": "nothing: fit shows its progress; modelhub.training.ProgressBar is the callback",
    "History": "nothing: fit returns a History",
    "LambdaCallback": "a class of your own, from modelhub.training.Callback, with the same hooks",
    "Callback": "a class of your own, from modelhub.training.Callback, with the same hooks",
    "TrainerCallback": "a class of your own, from modelhub.training.Callback: its hooks are Keras'",
}


def explained(thing: T) -> T:
    """A function that says in its errors what to write instead of what it does not take; of a class, its constructor.

    Raises UnknownArgument and WrongCall, which are TypeErrors, as Python's own.
    """
    if isinstance(thing, type):
        thing.__init__ = explained(thing.__init__)  # type: ignore[misc]
        return thing

    @functools.wraps(thing)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return thing(*args, **kwargs)
        except TypeError as error:
            if (problem := _problem(thing, error, args, kwargs)) is None:
                raise
            raise problem from None

    return call  # type: ignore[return-value]


class Habits:
    """Base of what users call methods of."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, member in list(vars(cls).items()):
            if name.startswith("_") and name != "__init__":
                continue
            if isinstance(member, FunctionType):
                setattr(cls, name, explained(member))
            elif isinstance(member, classmethod):
                setattr(cls, name, classmethod(explained(member.__func__)))

    if not TYPE_CHECKING:  # a checker would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            kind, ours = type(self), ATTRIBUTES.get(name, "")
            if hasattr(kind, name):  # a property that failed with an AttributeError of its own
                return object.__getattribute__(self, name)
            text = f"{kind.__name__!r} object has no attribute {name!r}"
            first = re.match(r"\w*", ours)[0]
            if ours and (first in ("modelhub", "nothing") or first in vars(self) or hasattr(kind, first)):
                text = f"{kind.__name__} has no {name}: use {ours}"
            raise AttributeError(text, name=name, obj=self)


def dtype_name(dtype: Any) -> str | None:
    """ "bfloat16" of "bf16", torch.bfloat16, jax.numpy.bfloat16, tf.bfloat16, numpy's types; None of None.

    What is no dtype comes back as a text that is none, for the caller to refuse.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))
    name = str(name).lower().rpartition(".")[2]
    return DTYPES.get(name, name)


def instead_of(callback: Any) -> str:
    """What to use in place of another library's callback; empty: nobody knows."""
    kind = callback if isinstance(callback, type) else type(callback)
    found = next((CALLBACKS[base.__name__] for base in kind.__mro__ if base.__name__ in CALLBACKS), None)
    return f"; in place of {kind.__name__} take {found}" if found else ""


def near(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", or nothing."""
    close = difflib.get_close_matches(name, dict.fromkeys(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _problem(
    function: Callable, error: TypeError, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> TypeError | None:
    """The error to raise in its place; None: it does not come from this call."""
    parameters = inspect.signature(function).parameters
    takes = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    passes_on = len(takes) < len(parameters)
    inner = error.__traceback__ and error.__traceback__.tb_next
    if inner is not None and getattr(function, "hands_on", False):
        inner = inner.tb_next
    if isinstance(error, UnknownArgument):
        # Of a function that hands its keywords on: the user wrote its name, and not that of the one inside.
        if not kwargs.keys() - set(takes) >= set(error.names):
            return None
        names, known = error.names, [name for name in takes if name not in ("self", "cls", "task")] + error.known
    elif inner is not None:
        return None  # raised by what runs inside
    else:
        names = () if passes_on else tuple(name for name in kwargs if name not in takes)
        known = [name for name in takes if name not in ("self", "cls", "task")]
    owner = _owner(function, args)
    shown = _shown(function, owner)
    if not names:
        loads = owner is not None and function.__name__ == "__init__" and hasattr(owner, "from_preset")
        hint = f". To load a model: {shown}.from_preset(name)" if loads else ""
        return WrongCall(str(error).replace(f"{function.__qualname__}()", f"{shown}()") + hint)
    advice = "; no ".join(_advice(name, known, function, owner) for name in names)
    return UnknownArgument(f"{shown}() has no {advice}", names, known)


def _advice(name: str, known: list[str], function: Callable, owner: type | None) -> str:
    more = f" {REMARKS[name]}" if name in REMARKS else ""
    candidates = (*KEYWORDS.get(name, ()), name)
    for ours in candidates:
        if ours in known:
            return f"{name}; did you mean {ours}=?{more}"
    for ours in (name, *candidates):
        if ours in ADVICE:
            return f"{name}: {ADVICE[ours]}{more}"
    others = _others(owner, function)
    for ours in candidates:
        if owner is not None and ours in others:
            return f"{name}: {owner.__name__}.{others[ours]}({ours}=...) takes it.{more}"
    if close := difflib.get_close_matches(name, known, n=1):
        return f"{name}; did you mean {close[0]}=?"
    return f"{name}; it takes {', '.join(known)}"


def _others(owner: type | None, function: Callable) -> dict[str, str]:
    """{keyword: the public method of the class that takes it}, the methods in the order in which they are called."""
    if owner is None:
        return {}
    order = ["from_preset", "enable_lora", "compile", "fit", "evaluate", "generate", "chat", "publish"]
    found: dict[str, str] = {}
    for method in order:
        member = getattr(owner, method, None)
        if member is not None and method != function.__name__:
            for keyword in inspect.signature(member).parameters:
                found.setdefault(keyword, method)
    return found


def _owner(function: Callable, args: tuple[Any, ...]) -> type | None:
    """The class that the user called the method of."""
    first = next(iter(inspect.signature(function).parameters), "")
    if not args or first not in ("self", "cls", "task"):
        return None
    return args[0] if isinstance(args[0], type) else type(args[0])


def _shown(function: Callable, owner: type | None) -> str:
    if owner is None:
        return function.__name__
    return owner.__name__ if function.__name__ == "__init__" else f"{owner.__name__}.{function.__name__}"
