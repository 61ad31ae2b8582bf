"""Hugging Face's Trainer, mended for captioners: exact loss under accumulation, whole checkpoints.

What is mended: the loss is the mean over all label tokens of an optimizer step, however it is cut
into micro-batches (transformers 5 multiplies it by their number); resuming and loading the best
model bring back every tensor (transformers 5 drops the encoder's silently); each checkpoint is a
whole captioner. Used by train_encoder_decoder.
"""

import errno
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from transformers import VisionEncoderDecoderModel as VED

from captionlib.collator import IGNORE, CaptionCollator
from captionlib.generation import Captioner, last_checkpoint, load_model
from captionlib.optimizer import MuonAdamW
from captionlib.shards import progress_bar


@dataclass
class CaptionTrainingArguments(Seq2SeqTrainingArguments):
    """transformers' training arguments; columns stay, because the collator needs them all."""

    output_dir: str | None = "runs/captioner"
    remove_unused_columns: bool = False
    report_to: str | list[str] = "none"
    label_names: list[str] | None = None
    save_total_limit: int | None = 2
    prediction_loss_only: bool = True
    logging_first_step: bool = True  # the loss before
    muon_learning_rate: float = 0.0  # above 0: Muon for the weight matrices (optimizer.py)

    def __post_init__(self):
        self.label_names = self.label_names or ["labels"]
        super().__post_init__()


class CaptionTrainer(Seq2SeqTrainer):
    """Trains a Captioner: `CaptionTrainer(captioner, args, collator, train_dataset=...)`.

    Batches arrive with uint8 pictures and are normalised on the model's device.
    """

    def __init__(
        self, captioner: Captioner, args, collator: CaptionCollator, eval_collator=None, **arguments
    ):
        super().__init__(
            captioner.model,
            args,
            data_collator=collator,
            processing_class=captioner.tokenizer,
            **arguments,
        )
        self.captioner = captioner
        self.eval_collator = eval_collator or collator
        self.add_callback(_SameDraws(collator))
        self.model_accepts_loss_kwargs = True  # compute_loss below divides by num_items_in_batch

    def get_eval_dataloader(self, eval_dataset=None):
        training, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def create_optimizer(self, model=None):
        args = self.args
        if not args.muon_learning_rate or self.optimizer is not None:
            return super().create_optimizer(model)
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer = MuonAdamW(
            self.model, args.muon_learning_rate, args.learning_rate, betas, args.weight_decay
        )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy summed over this micro-batch, over the labels of the whole step."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        inputs["pixel_values"] = self.captioner.transform.normalise(inputs["pixel_values"])
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits.float().flatten(0, 1)  # [B * L, V]
        smoothing = self.args.label_smoothing_factor
        loss = cross_entropy(
            logits,
            labels.flatten(),
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=smoothing,
        )
        if num_items_in_batch is None:
            loss = loss / (labels != IGNORE).sum()
        else:  # DDP takes the mean over processes of what is a sum
            spread = self.args.average_tokens_across_devices
            loss = loss / num_items_in_batch * (self.accelerator.num_processes if spread else 1)
        return (loss, outputs) if return_outputs else loss

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        self.captioner.image_processor.save_pretrained(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        with _full_disk_is_os_error(self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_weights(model or self.model, resume_from_checkpoint)

    def _load_best_model(self):
        load_weights(self.model, self.state.best_model_checkpoint)


@contextmanager
def _full_disk_is_os_error(folder):
    """safetensors and torch.save raise errors of their own where a file cannot be written."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if "I/O error" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "no room for the model", str(folder)) from error


def load_weights(model: VED, folder) -> None:
    """Every tensor of the saved model into `model`; from_pretrained knows the saved names."""
    model.load_state_dict(load_model(folder).state_dict(), strict=True)


class Watch(TrainerCallback):
    """Looks on while training: `look(step)` at step 0 and every `every` steps, `show(log)` at logs.

    For live curves and sample captions in a notebook; either may be None.
    """

    def __init__(self, every: int, look: Callable | None = None, show: Callable | None = None):
        self.every, self.look, self.show = every, look, show

    def on_train_begin(self, args, state, control, **_):
        if self.look and state.global_step == 0:
            self.look(0)

    def on_step_end(self, args, state, control, **_):
        if self.look and state.global_step % self.every == 0:
            self.look(state.global_step)

    def on_log(self, args, state, control, **_):
        if self.show:
            self.show(state.log_history)


class _Progress(TrainerCallback):
    """A bar over the steps, and one line an evaluation, instead of a line a log."""

    def on_train_begin(self, args, state, control, **_):
        self.bar = progress_bar(state.max_steps, "train", state.global_step)

    def on_step_end(self, args, state, control, **_):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        if "eval_loss" in logs:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            train = f"loss {losses[-1]:.3f}, " if losses else ""
            tqdm.write(f"step {state.global_step}: {train}eval_loss {logs['eval_loss']:.3f}")

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


class _SameDraws(TrainerCallback):
    """Lets the collator go on counting where the checkpoint's run was."""

    def __init__(self, collator: CaptionCollator):
        self.collator = collator

    def on_train_begin(self, args, state, control, **_):
        self.collator.visit = state.global_step * args.gradient_accumulation_steps


class _SaveAndStop(TrainerCallback):
    """On Ctrl-C: finish the step, save a checkpoint, stop."""

    def __init__(self):
        self.asked = False

    def on_step_end(self, args, state, control, **_):
        if self.asked:
            control.should_save = control.should_training_stop = True


@contextmanager
def _interrupt_saves(trainer: CaptionTrainer):
    """Within it the first Ctrl-C saves and ends as KeyboardInterrupt; a second one ends at once."""
    stopper = _SaveAndStop()
    trainer.add_callback(stopper)
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main one
        yield
        return

    def ask(signum, frame):
        if stopper.asked:
            raise KeyboardInterrupt
        stopper.asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if stopper.asked:
        raise KeyboardInterrupt


def train(
    captioner: Captioner,
    data: datasets.DatasetDict,
    args: CaptionTrainingArguments,
    collator: CaptionCollator,
    callbacks=(),
    eval_collator: CaptionCollator | None = None,
) -> list[dict]:
    """Train on data["train"], evaluate on data["val"] (without augmentation: `eval_collator`).

    Returns the log: dicts of step, loss, eval_loss, ...

    Goes on from the last checkpoint in `args.output_dir`, if there is one. Ctrl-C saves a
    checkpoint and raises KeyboardInterrupt. At the end the captioner is saved in output_dir.
    """
    args.disable_tqdm = True
    trainer = CaptionTrainer(
        captioner,
        args,
        collator,
        train_dataset=undecoded(data["train"]),
        eval_dataset=undecoded(data["val"]) if "val" in data else None,
        eval_collator=eval_collator,
        callbacks=[_Progress(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    folder = Path(args.output_dir)
    checkpoint = last_checkpoint(folder)
    with _interrupt_saves(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    captioner.model.eval()
    with _full_disk_is_os_error(folder):
        captioner.save_pretrained(folder)
    trainer.save_state()
    return trainer.state.log_history


def undecoded(data: datasets.Dataset) -> datasets.Dataset:
    """Pictures as their stored bytes: the collator decodes them, once."""
    return data.cast_column("image", datasets.Image(decode=False))
