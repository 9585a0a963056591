import pytest
import torch
from conftest import character_tokenizer, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from agcl.data.tasks import Task, collate
from agcl.metrics.text import sari
from agcl.scoring import LeavesAnswer, TaskScorer, answer_logits, generate_answers, rank_labels, token_nll


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(request.param)).double().eval()


def row(prompt, answer, label=-1):
    tokenizer = character_tokenizer()
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = [*tokenizer(answer)["input_ids"], 1]
    return {
        "input_ids": prompt_ids + answer_ids,
        "labels": [-100] * len(prompt_ids) + answer_ids,
        "label": label,
        "answer": answer.strip(),
    }


def reference_nll(model, sample):
    """One unpadded row, the whole logits, token by token."""
    logits = model(torch.tensor([sample["input_ids"]])).logits[0].log_softmax(-1)
    return [-logits[p - 1, token].item() for p, token in enumerate(sample["labels"]) if token != -100]


def test_padding_and_trimming_do_not_change_likelihoods(model):
    rows = [row("cat?", " ab"), row("a longer prompt?", " c")]
    nll = token_nll(*answer_logits(model, collate(rows, pad_token_id=1)))
    for index, sample in enumerate(rows):
        expected = torch.tensor(reference_nll(model, sample))
        assert torch.allclose(nll[index][nll[index] != 0], expected, atol=1e-5)


def test_only_answer_positions_reach_the_vocabulary_projection(model):
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    answer_logits(model, collate([row("a rather long prompt?", " ab")], pad_token_id=1))
    assert seen == [5]  # " ", "a", "b", end of sequence, and the one before that predicts the first


def test_generation_equals_step_by_step_argmax(model):
    prompts = [row(p, "")["input_ids"][:-1] for p in ("cat?", "a longer prompt?")]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(5):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == 1:
                break
        expected.append(character_tokenizer().decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    assert generate_answers(model, character_tokenizer(), prompts, max_new_tokens=5) == expected


def test_an_answer_ends_at_the_token_given_too(model):
    tokenizer = character_tokenizer()
    (free,) = generate_answers(model, tokenizer, [[5, 6]], max_new_tokens=6)
    end = tokenizer.convert_tokens_to_ids(free[2])
    (ended,) = generate_answers(model, tokenizer, [[5, 6]], max_new_tokens=6, end_token_id=end)
    assert len(free) > 3
    assert ended == free[: free.index(free[2]) + 1]


def test_rows_that_left_their_answer_are_not_finished(model):
    prompts = [row(p, "")["input_ids"][:-1] for p in ("cat?", "a longer prompt?", "owl?")]
    free = generate_answers(model, character_tokenizer(), prompts, max_new_tokens=6)
    assert all(len(answer) > 2 for answer in free)
    wrong = free[1][0] + "#" + free[1][2:]  # goes wrong at its second character
    given = generate_answers(model, character_tokenizer(), prompts, max_new_tokens=6, wanted=[free[0], wrong, free[2]])
    assert given == [free[0], free[1][:2], free[2]]


def test_answers_of_unfinished_characters_are_not_left():
    class Bytes:
        """Decodes two tokens to one character, and closes up spaces afterwards, as some tokenizers do."""

        def batch_decode(self, rows, skip_special_tokens):
            texts = {1: "\ufffd", 2: "\u00e9", 3: "\u00e9 n", 4: "\u00e9n't", 5: "\u00e9n'x"}
            return [texts[len(ids)] for ids in rows]

    criterion = LeavesAnswer(Bytes(), ["\u00e9n't"], prompt_length=2)
    assert [criterion(torch.zeros(1, 2 + n), None).item() for n in (1, 2, 3, 4, 5)] == [False] * 4 + [True]


def test_ranking_takes_the_most_likely_label(model):
    labels = [" a", " bb", " c"]
    prompts = ["cat?", "a longer prompt?"]
    expected = [
        min(range(3), key=lambda k, p=prompt: sum(reference_nll(model, row(p, labels[k])))) for prompt in prompts
    ]
    given = rank_labels(
        model,
        [row(p, "")["input_ids"][:-1] for p in prompts],
        [row("", label)["input_ids"] for label in labels],
        pad_token_id=1,
    )
    assert given.tolist() == expected


class Parrot(nn.Module):
    """Answers every prompt with the same token, then closes."""

    def __init__(self, answer: str):
        super().__init__()
        self.answer = answer
        self.device = torch.device("cpu")
        self.config = PreTrainedConfig()

    def generate(self, input_ids, **options):
        ids = character_tokenizer()(self.answer)["input_ids"]
        return torch.cat([input_ids, torch.tensor([[*ids, 1]] * len(input_ids))], dim=1)

    def forward(self, input_ids, attention_mask, use_cache):
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 70)})()


def test_long_prompts_leave_short_ones_their_room(model):
    prompts = [row("x" * 60, "")["input_ids"][:-1], row("cat?", "")["input_ids"][:-1]]  # the context has 64 tokens
    together = generate_answers(model, character_tokenizer(), prompts, max_new_tokens=8)
    assert together[0] == generate_answers(model, character_tokenizer(), prompts[:1], max_new_tokens=4)[0]
    assert together[1] == generate_answers(model, character_tokenizer(), prompts[1:], max_new_tokens=8)[0]
    alone = generate_answers(model, character_tokenizer(), prompts[:1], max_new_tokens=8)  # room for four
    assert alone == together[:1]


def test_ranking_a_label_that_does_not_fit_beside_the_prompt_leaves_out_its_beginning(model):
    candidates = [row("", " b")["input_ids"], row("", " cdefgh")["input_ids"]]
    prompt = row("x" * 20 + "cat and dog and eel and owl and hen and?", "")["input_ids"][:-1]
    assert 64 - len(candidates[1]) < len(prompt) < 64
    cut = prompt[len(prompt) + len(candidates[1]) - 64 :]
    reference = [
        -sum(reference_nll(model, {"input_ids": cut + ids, "labels": [-100] * len(cut) + ids})) for ids in candidates
    ]
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    ranked = rank_labels(model, [prompt], candidates, pad_token_id=1)
    assert ranked.tolist() == [max(range(2), key=lambda index: reference[index])]
    assert [ids.shape[1] for ids in seen] == [len(cut) + len(ids) for ids in candidates]


def test_label_accuracy_knows_the_whole_answer_template():
    task = Task(name="t", source="x", answer=" it {y}", metric="label_accuracy", labels=["a", "b"])
    scorer = TaskScorer(task, [], 6)
    scorer.update(Parrot(" it a"), character_tokenizer(), collate([row("cat?", " it a", 0)], 1))
    assert scorer.compute()["score"] == 1.0


def test_one_row_that_is_no_number_is_enough():
    class Diverged(Parrot):
        def forward(self, input_ids, attention_mask, use_cache):
            logits = torch.zeros(*input_ids.shape, 70)
            logits[0] = torch.nan
            return type("Output", (), {"logits": logits})()

    scorer = TaskScorer(Task(name="t", source="x"), [], 3)
    scorer.update(Diverged(" a"), character_tokenizer(), collate([row("cat?", " a"), row("dog?", " a")], 1))
    assert scorer.compute()["nll"].isnan()


@pytest.mark.parametrize(("answer", "expected"), [(" a", 0.5), (" b", 0.25), (" z", 0.0)])
def test_scores_are_shares_of_right_answers(answer, expected):
    rows = [row("cat?", " a", 0), row("dog?", " a", 0), row("owl?", " b", 1), row("eel?", " c", 2)]
    for metric in ("exact_match", "label_accuracy"):
        scorer = TaskScorer(Task(name="t", source="x", metric=metric, labels=["a", "b", "c"]), [], 3)
        for start in (0, 3):  # uneven batches
            scorer.update(Parrot(answer), character_tokenizer(), collate(rows[start : start + 3], 1))
        values = scorer.compute()
        assert values["score"].item() == pytest.approx(expected)
        assert values["nll"].item() == pytest.approx(torch.tensor(70.0).log().item())


def test_first_answers_are_kept_with_their_scores(model):
    rows = [row("cat?", " a", 0), row("dog?", " b", 1), row("owl?", " a", 0)]
    labels = [row("", f" {label}")["input_ids"] for label in "ab"]
    for metric in ("exact_match", "label_accuracy", "rouge_l", "label_ranking"):
        task = Task(name="t", source="x", answer=" {y}", metric=metric, labels=["a", "b"])
        scorer = TaskScorer(task, labels, 3, num_answers=2)
        answering = model if metric == "label_ranking" else Parrot(" a")
        for start in (0, 2):
            scorer.update(answering, character_tokenizer(), collate(rows[start : start + 2], 1))
        assert [(answer.prompt, answer.right) for answer in scorer.answers] == [("cat?", "a"), ("dog?", "b")]
        assert [answer.score for answer in scorer.answers] == [a.given == a.right for a in scorer.answers]
        given = {"a", "b"} if metric == "label_ranking" else {"a"}
        assert {answer.given for answer in scorer.answers} <= given


def scored(answer, *rows, **options):
    """The score of a model that gives one answer to all rows."""
    scorer = TaskScorer(Task(name="t", source="x", **options), [], 12)
    scorer.update(Parrot(answer), character_tokenizer(), collate(rows, 1))
    return scorer.compute()["score"].item()


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("exact_match", 1 / 2),
        ("first_character", 1 / 2),
        ("edit_similarity", (1 + 1 - 4 / 6) / 2),
        ("rouge_l", (1 + 1 / 2) / 2),
        ("sari", (sari("a c", "a b", ["a c"]) + sari("a c", "a c", ["b c"])) / 2),
    ],
)
def test_score_is_the_mean_over_rows(metric, expected):
    rows = [row("a b", " a c"), row("a c", " b c")]
    if metric == "edit_similarity":
        rows[1] = row("a c", " aef")  # "a c": two of three letters replaced
    assert scored(" a c", *rows, metric=metric) == pytest.approx(expected)


def test_substitutions_apply_to_both_answers():
    options = {"metric": "exact_match", "substitutions": {"z(.)": r"\1", "q": "a"}}
    assert scored(" zab", row("a", " qb"), **options) == 1
    assert scored(" zab", row("a", " zqb"), **options) == 1
    assert scored(" zab", row("a", " ac"), **options) == 0


def test_the_task_may_shorten_answers():
    task = Task(name="t", source="x", max_new_tokens=3)
    assert TaskScorer(task, [], 12).max_new_tokens == 3
    assert TaskScorer(task, [], 2).max_new_tokens == 2


def test_a_first_character_is_all_that_is_generated(model):
    seen = []
    generate = model.generate
    model.generate = lambda **options: seen.append(generate(**options)) or seen[-1]
    scorer = TaskScorer(Task(name="t", source="x", metric="first_character"), [], 12)
    scorer.update(model, character_tokenizer(), collate([row("cat?", " abcdefghij"), row("dog?", " bcdefghij")], 1))
    assert seen[0].shape[1] <= 4 + 3  # the prompt, a space, the character, and one that leaves the answer
