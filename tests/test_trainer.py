"""Training: the loss however it is cut, resuming as if never stopped, four pairs by heart."""

import pytest
import torch
from conftest import TINY_GPT2, TINY_VIT

from captionlib import CaptionCollator, CaptionTrainer, CaptionTrainingArguments, glue, scenes
from captionlib.generation import last_checkpoint
from captionlib.optimizer import MuonAdamW
from captionlib.trainer import load_weights

ROWS = [
    {"image": scenes.draw(scene), "captions": scenes.captions(scene, n)["en"][: 1 + n % 4]}
    for n, scene in enumerate(scenes.make_scene(number) for number in range(16))
]


def train(tokenizer, folder, resume=None, rows=ROWS, mode="packed", augment="none", **options):
    captioner = glue(TINY_VIT, TINY_GPT2, tokenizer, seed=5)
    start = captioner.start_ids(None)[0]
    collator = CaptionCollator(tokenizer, captioner.transform, start, mode, augment=augment)
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2,
        "learning_rate": 1e-3, "save_total_limit": None, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    args = CaptionTrainingArguments(output_dir=str(folder), **(defaults | options))
    trainer = CaptionTrainer(captioner, args, collator, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train(resume_from_checkpoint=resume)
    return captioner, trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_loss_does_not_depend_on_how_a_step_is_cut(tokenizer, tmp_path):
    """One batch of 16 (with 1 to 4 captions an image) or 4 micro-batches of 4: one mean."""
    whole = train(tokenizer, tmp_path / "1", per_device_train_batch_size=16, max_steps=3)[1]
    cut = train(tokenizer, tmp_path / "4", gradient_accumulation_steps=4, max_steps=3)[1]
    assert losses(cut) == pytest.approx(losses(whole), abs=2e-3)
    norms = [
        [e["grad_norm"] for e in t.state.log_history if "grad_norm" in e] for t in (whole, cut)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_resuming_equals_never_stopping(tokenizer, tmp_path, muon):
    """Also in what is drawn at random: the caption of an image, the part of it that is seen."""
    options = {"muon_learning_rate": muon, "mode": "sampled", "augment": "crop"}
    never, trainer = train(tokenizer, tmp_path / "never", **options)
    resumed, again = train(
        tokenizer, tmp_path / "again", resume=str(tmp_path / "never/checkpoint-2"), **options
    )
    assert losses(again)[2:] == losses(trainer)[2:]
    for name, value in never.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_the_best_model_is_loaded_whole(tokenizer, tmp_path):
    captioner, trainer = train(
        tokenizer,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip  (the worst one, so that it is not the last)
    assert trainer.state.best_global_step == 2
    saved = glue(TINY_VIT, TINY_GPT2, tokenizer, seed=9)
    load_weights(saved.model, tmp_path / "checkpoint-2")
    for name, value in saved.model.state_dict().items():
        assert torch.equal(captioner.model.state_dict()[name], value), name


def test_a_checkpoint_is_a_whole_captioner(tokenizer, tmp_path):
    from captionlib import Captioner

    captioner, _ = train(tokenizer, tmp_path, max_steps=2)
    loaded = Captioner.from_pretrained(tmp_path / "checkpoint-2", "cpu")
    pictures = [row["image"] for row in ROWS[:3]]
    assert loaded.caption(pictures) == captioner.caption(pictures)


def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(tokenizer, tmp_path):
    train(tokenizer, tmp_path)
    assert last_checkpoint(tmp_path).endswith("checkpoint-6")
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path).endswith("checkpoint-4")
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_four_pairs_are_learnt_by_heart_and_wrong_images_raise_the_loss(tokenizer, tmp_path):
    rows = [{**row, "captions": row["captions"][:1]} for row in ROWS[:4]]
    captioner, trainer = train(
        tokenizer, tmp_path, rows=rows, mode="separate", max_steps=120, learning_rate=5e-3,
        save_strategy="no",
    )  # fmt: skip
    assert losses(trainer)[-1] < 0.1
    images = [row["image"] for row in rows]
    wanted = [row["captions"][0] for row in rows]
    assert captioner.caption(images) == wanted
    assert captioner.caption(images[1:] + images[:1]) == wanted[1:] + wanted[:1]
    swapped = [{**a, "image": b["image"]} for a, b in zip(rows, rows[1:] + rows[:1], strict=True)]
    assert trainer.evaluate(swapped)["eval_loss"] > 10 * trainer.evaluate(rows)["eval_loss"]


def test_muon_takes_the_matrices_and_nothing_is_left_out(captioner):
    optimizer = MuonAdamW(captioner.model, muon_lr=0.02, lr=1e-3)
    matrices, others = (
        {id(p) for group in part.param_groups for p in group["params"]} for part in optimizer.parts
    )
    assert not matrices & others
    assert matrices | others == {id(p) for p in captioner.model.parameters()}
    tables = {id(captioner.model.decoder.transformer.wte.weight)}
    assert tables <= others
    assert id(captioner.model.decoder.transformer.h[0].mlp.c_fc.weight) in matrices
