"""The task of indirect objects, and runs of a model on it with one activation replaced."""

from __future__ import annotations

import pytest
import torch

from fastsae.analysis import (
    IOITask,
    TaskRuns,
    approximation,
    edit_success,
    solvable,
    solved,
    supervised_dictionary,
    task_activations,
)
from fastsae.analysis.ioi import FIELDS
from tests.analysis.words import Words, random_model

SITE, D = "resid_post.0", 16


@pytest.fixture(scope="module")
def task():
    return IOITask(Words(), names=["Mary", "John", "Anne", "Maximilian", "Tom"])


@pytest.fixture(scope="module")
def model():
    return random_model(D)


def test_prompts_say_what_their_attributes_say(task):
    prompts = task.draw(60, seed=0)
    assert task.names == ["Mary", "John", "Anne", "Tom"]  # Maximilian is two tokens
    for row in range(60):
        ids = prompts.ids[row]
        text = task.tokenizer.decode(ids)
        io, s = (task.names[prompts.attributes[name][row]] for name in ("IO", "S"))
        assert io != s
        at = {role: int(places[row]) for role, places in prompts.positions.items()}
        words = {role: task.tokenizer.decode([ids[place]]) for role, place in at.items()}
        assert words["IO"] == " " + io
        assert words["S1"] == words["S2"] == " " + s
        assert at["end"] == len(ids) - 1
        assert at["S1"] < at["S2"]
        assert (at["IO"] < at["S1"]) == (prompts.attributes["Pos"][row] == 0)
        assert text.count(s) == 2
        assert text.count(io) == 1
        assert ids[0] == 1
        assert task.tokenizer.decode([int(prompts.candidates[prompts.right[row]])]) == " " + io
        assert task.tokenizer.decode([int(prompts.candidates[prompts.wrong[row]])]) == " " + s
    again = task.draw(60, seed=0)
    assert again.ids == prompts.ids
    assert task.draw(60, seed=1).ids != prompts.ids


@pytest.mark.parametrize("attribute", ["IO", "S", "Pos"])
def test_one_attribute_is_changed_and_nothing_else(task, attribute):
    prompts = task.draw(200, seed=2)
    other = prompts.changed(attribute)
    differs = prompts.fields != other.fields
    assert differs[:, FIELDS.index(attribute)].all()
    assert differs.sum() == 200
    assert (other.attributes["IO"] != other.attributes["S"]).all()
    if attribute != "Pos":
        assert len(other.attributes[attribute].unique()) == 4
    with pytest.raises(ValueError, match="expected attribute to be IO, S or Pos"):
        prompts.changed("place")


def test_what_is_no_task_is_refused():
    with pytest.raises(ValueError, match="expected three names that are one token each, got Tom"):
        IOITask(Words(), names=["Maximilian", "Tom"])
    with pytest.raises(ValueError, match=r"expected \{S\} in a template"):
        IOITask(Words(), templates=["{A} and {B} met"])


@pytest.mark.parametrize("position", ["end", "S2", "IO"])
def test_replaced_activations_are_those_of_a_whole_pass(task, model, position):
    prompts = task.draw(9, seed=3)
    rows = torch.randn(9, D, generator=torch.Generator().manual_seed(4))
    runs = TaskRuns(model, prompts, position, batch_size=4)
    clean, got = runs.logits(), runs.logits(SITE, rows)
    for row, ids in enumerate(prompts.ids):
        place = int(prompts.positions[position][row])

        def put(module, args, output, place=place, row=row):
            output[0, place] = rows[row]
            return output

        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1, prompts.candidates]
            torch.testing.assert_close(clean[row], wanted, rtol=1e-4, atol=1e-4)
            handle = model.model.layers[0].register_forward_hook(put)
            wanted = model(torch.tensor([ids])).logits[0, -1, prompts.candidates]
            handle.remove()
        torch.testing.assert_close(got[row], wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got[row], clean[row], atol=1e-2)
    with pytest.raises(ValueError, match="expected position to be one of IO, S1, S2, end"):
        TaskRuns(model, prompts, "start")
    with pytest.raises(ValueError, match=r"expected rows to be \[9, d\]"):
        runs.logits(SITE, rows[:3])


def test_activations_put_back_where_they_were_change_nothing(task, model):
    prompts = task.draw(11, seed=5)
    sites = [SITE, "head.1.1", "attn_z.1"]
    got = task_activations(model, prompts, sites, "S2", batch_size=4)
    torch.testing.assert_close(got["head.1.1"], got["attn_z.1"][:, D // 2 :])
    runs = TaskRuns(model, prompts, "S2")
    for site in sites:
        torch.testing.assert_close(
            runs.logits(site, got[site]), runs.logits(), rtol=1e-4, atol=1e-4
        )


def by_preference(model, prompts):
    """Return the prompts on which the model is right."""
    difference = prompts.logit_difference(TaskRuns(model, prompts, "end").logits())
    return prompts.subset(difference > 0)


def test_perfect_and_useless_reconstructions(task, model):
    prompts = by_preference(model, task.draw(60, seed=6))
    runs = TaskRuns(model, prompts, "end")
    x = task_activations(model, prompts, ["resid_post.1"], "end")["resid_post.1"]
    mean = x.mean(0)
    whole = approximation(runs, "resid_post.1", x, x, mean)
    assert whole.sufficiency.value == pytest.approx(1, abs=1e-4)
    assert whole.necessity.value == pytest.approx(1, abs=1e-4)
    none = approximation(runs, "resid_post.1", x, mean.expand_as(x), mean)
    assert none.sufficiency.value == pytest.approx(none.ablated / none.clean, abs=1e-4)
    assert none.necessity.value == pytest.approx(0, abs=1e-4)
    half = approximation(runs, "resid_post.1", x, (x + mean) / 2, mean)
    assert half.necessity.value == pytest.approx(
        (half.clean - half.sufficiency.value * half.clean) / (half.clean - half.ablated), abs=1e-3
    )  # mean + (x - x_hat) is x_hat itself
    assert half.sufficiency.low <= half.sufficiency.value <= half.sufficiency.high


def test_a_task_that_the_model_does_not_do_has_no_shares(task, model):
    prompts = task.draw(60, seed=6)
    difference = prompts.logit_difference(TaskRuns(model, prompts, "end").logits())
    wrong = prompts.subset(difference < 0)
    x = task_activations(model, wrong, [SITE], "end")[SITE]
    with pytest.raises(ValueError, match="expected a logit difference above 0"):
        approximation(TaskRuns(model, wrong, "end"), SITE, x, x, x.mean(0))


def test_edits_that_are_the_truth_succeed_and_doing_nothing_may_not(task, model):
    prompts = task.draw(40, seed=7)
    site = "resid_post.2"
    x = task_activations(model, prompts, [site], "end")[site]
    target = x.roll(1, 0)
    runs = TaskRuns(model, prompts, "end")
    success = edit_success(runs, site, target, {"none": x, "truth": target})
    assert success["truth"].all()
    wanted = runs.logits().argmax(1) == runs.logits().argmax(1).roll(1)
    assert torch.equal(success["none"], wanted)
    assert not wanted.all()


def test_what_a_model_can_do_is_kept(task, model):
    prompts = task.draw(120, seed=8)
    result = solved(model, prompts)
    right = prompts.logit_difference(TaskRuns(model, prompts, "end").logits()) > 0
    assert result.accuracy == pytest.approx(float(right.double().mean()))
    own = right[prompts.attributes["IO"] == 2].double().mean()
    assert float(result.by["IO"][2]) == pytest.approx(float(own))
    assert solvable(task, result, at_least=0.0).names == task.names
    with pytest.raises(ValueError, match="expected three names"):
        solvable(task, result, at_least=1.01)


def test_a_supervised_dictionary_of_the_last_layer_holds_the_answer(task, model):
    """Attributes of this task are all that prompts of one template, place and thing differ in."""
    fields = task.draw(300, seed=9).fields
    fields[:, :3] = 0
    prompts = task.build(fields)
    site = "embed"
    x = task_activations(model, prompts, [site], "S2")[site]
    made = supervised_dictionary(x, prompts.attributes)
    torch.testing.assert_close(made.reconstruct(prompts.attributes).float(), x, rtol=0, atol=1e-4)
    assert made.norms()["S"] > 1000 * made.norms()["IO"]  # S2 is the name S, whatever IO is
