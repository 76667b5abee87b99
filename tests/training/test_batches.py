"""Packing and buckets keep every token; ready batches of every framework come out as the same four arrays."""

import itertools
import random
from bisect import bisect_left
from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from modelhub.errors import DataError
from modelhub.processing.tokenizer import Tokenizer
from modelhub.training.batches import WIDTHS, Batches, least_padding, pack, prepare
from modelhub.training.examples import Example
from modelhub.training.ready_batches import NO_LABEL, ReadyBatches, complete

NAMES = ["input_ids", "labels", "position_ids", "segment_ids"]


def dolly_like(count, seed=0, longest=512):
    """Median 125, mean 160, 90% below 310 tokens, as Dolly's; ids that are all different where there are few."""
    draw = np.random.default_rng(seed)
    lengths = np.clip(np.exp(draw.normal(np.log(125), 0.72, count - 1)), 2, longest).astype(int)
    examples, begin = [], 1
    for length in [2, *lengths]:
        loss = np.arange(length) >= length // 3  # also of a first token, where the length is 2
        examples.append(Example(np.arange(begin, begin + length, dtype=np.int32), loss))
        begin += length
    return examples


def unpack(batches):
    """(ids, positions, labels) of every segment of every row, and how many rows and batches there were."""
    found = []
    for batch in batches:
        assert list(batch) == NAMES
        assert all(array.dtype == np.int32 and array.shape == batch["input_ids"].shape for array in batch.values())
        for ids, labels, positions, segments in zip(*batch.values(), strict=True):
            filled = segments[segments > 0]
            assert (segments[: len(filled)] == filled).all() and (np.diff(filled) >= 0).all()
            assert (labels[segments == 0] == NO_LABEL).all()
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                found.append((ids[here].tolist(), positions[here].tolist(), labels[here].tolist()))
    return found


def expected(examples):
    found = []
    for example in examples:
        labels = np.where(example.loss, example.ids, NO_LABEL)
        labels[0] = NO_LABEL  # nothing comes before it
        found.append((example.ids.tolist(), list(range(len(labels))), labels.tolist()))
    return found


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    return all(np.array_equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in NAMES)


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (7, 3), (300, 4)])
def test_every_token_of_every_example_once_in_each_epoch(packing, shuffle, count, batch_size):
    examples = dolly_like(count)
    data = Batches(examples, 512, batch_size, packing=packing, shuffle=shuffle)
    for epoch in (0, 3):
        batches = list(data.epoch(epoch))
        assert len(batches) == data.steps(epoch)
        assert {len(batch["input_ids"]) for batch in batches} == {batch_size}
        assert sorted(unpack(batches)) == sorted(expected(examples))


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_depends_on_seed_and_number_alone_and_can_begin_anywhere(packing):
    examples = dolly_like(200)
    data = Batches(examples, 512, 4, packing=packing, seed=1)
    first = list(data.epoch(0))
    assert not same(first[:5], list(data.epoch(1))[:5])
    assert same(first, data.epoch(0)) and same(first, Batches(examples, 512, 4, packing=packing, seed=1).epoch(0))
    assert not same(first[:5], list(Batches(examples, 512, 4, packing=packing, seed=2).epoch(0))[:5])
    for start in (0, 3, len(first)):
        assert same(first[start:], Batches(examples, 512, 4, packing=packing, seed=1).epoch(0, start))
    still = Batches(examples, 512, 4, packing=packing, shuffle=False)
    assert same(still.epoch(0), still.epoch(7))


def test_rows_are_full_and_mixed():
    examples = dolly_like(3000)
    data = Batches(examples, 512, 8)
    assert data.report().fill > 0.95
    numbers = {int(example.ids[0]): number for number, example in enumerate(examples)}
    rows = [row for batch in data.epoch(0) for row in zip(batch["input_ids"], batch["segment_ids"], strict=True)]
    members = [
        [numbers[int(ids[np.argmax(segments == s)])] for s in range(1, segments.max() + 1)] for ids, segments in rows
    ]
    flat = [number for row in members for number in row]
    assert abs(np.corrcoef(np.arange(len(flat)), flat)[0, 1]) < 0.1  # the order of the examples is gone
    lengths = [np.mean([len(examples[number].ids) for number in row]) for row in members if row]
    assert abs(np.corrcoef(np.arange(len(lengths)), lengths)[0, 1]) < 0.1  # and no trend from long to short
    partners = np.array([len(row) for row in members])
    assert np.mean((partners >= 2) & (partners <= 5)) > 0.8  # rows of short examples only would have many more


@pytest.mark.parametrize("sequence_length", [100, 512, 700, 4096])
def test_buckets_have_few_widths_and_little_padding(sequence_length):
    data = Batches(dolly_like(1000, longest=sequence_length), sequence_length, 4, packing=False)
    batches = list(data.epoch(0))
    widths = {batch["input_ids"].shape[1] for batch in batches}
    assert len(widths) <= WIDTHS
    assert all(width % 64 == 0 or width == sequence_length for width in widths)
    assert sum((batch["segment_ids"].max(axis=1) == 0).any() for batch in batches) <= 1  # one has empty rows
    assert data.report().fill > 0.75


def test_the_widths_pad_least():
    draw = random.Random(0)
    for _ in range(5):
        lengths = [int(draw.lognormvariate(5, 1)) % 900 + 1 for _ in range(40)]
        sizes = sorted({min(-(-length // 64) * 64, 900) for length in lengths})
        choices = [c for k in range(1, WIDTHS + 1) for c in itertools.combinations(sizes, k) if c[-1] == sizes[-1]]
        cost = {c: sum(c[bisect_left(c, length)] for length in lengths) for c in choices}
        assert cost[tuple(least_padding(lengths, 900))] == min(cost.values())


def test_best_fit():
    draw = random.Random(0)
    for _ in range(30):
        lengths = [draw.randrange(1, 41) for _ in range(draw.randrange(60))]
        free = []  # of the rows, the plain way
        for length in lengths:
            space = min((space for space in free if space >= length), default=None)
            if space is None:
                free.append(40 - length)
            else:
                free[free.index(space)] = space - length
        rows = pack(lengths, 40)
        assert sorted(40 - sum(lengths[i] for i in row) for row in rows) == sorted(free)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))


def test_fingerprint():
    examples = dolly_like(20)
    wanted = Batches(examples, 512, 4).fingerprint
    assert Batches(dolly_like(20), 256 * 2, 8, packing=False, seed=3).fingerprint == wanted
    assert Batches(examples[::-1], 512, 4).fingerprint != wanted
    examples[3].loss[-1] = False
    assert Batches(examples, 512, 4).fingerprint != wanted


def test_errors_of_examples():
    with pytest.raises(DataError, match="600 tokens, more than sequence_length=512"):
        Batches([Example(np.ones(600, np.int32), np.ones(600, bool))], 512, 4)
    with pytest.raises(DataError, match="batch_size must be 1 or more"):
        Batches(dolly_like(3), 512, 0)
    silent = [Example(np.ones(5, np.int32), np.arange(5) == 0)] * 3  # a first token is never learnt
    with pytest.raises(DataError, match="none of the 3 examples has a token to learn"):
        Batches(silent, 512, 4)


def test_from_records_to_batches_with_a_report(tiny_preset):
    tokenizer = Tokenizer.from_folder(tiny_preset)
    rows = [{"instruction": "Where is it?", "response": f"Under the bridge {i}."} for i in range(20)]
    rows += [
        {"instruction": "Write.", "response": "The river runs past the old mill. " * 9},
        {"instruction": "?", "response": ""},
    ]
    data = prepare(rows, tokenizer, None, 64, 2)
    answers = Counter()
    for batch in data.epoch(0):
        padding = batch["segment_ids"] == 0
        assert (batch["input_ids"][padding] == tokenizer.pad_token_id).all()
        for labels, segments in zip(batch["labels"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                answers[tokenizer.decode(labels[(segments == segment) & (labels >= 0)], False)] += 1
    assert {row["response"] + "<eos>" for row in rows[:20]} < answers.keys()
    report = data.report()
    assert (report.examples, report.cut, report.dropped, report.steps) == (21, 1, {"empty response": 1}, data.steps(0))
    text = str(report)
    assert text.startswith("21 examples, ") and "\x1b" not in text
    assert f"{report.steps} steps an epoch, each 2 rows or {21 / report.steps:.1f} examples" in text
    assert "1 cut at the end to fit sequence_length\n1 dropped: empty response\n" in text
    assert text.endswith("<bos>Instruction:\nWhere is it?\n\nResponse:\n»Under the bridge 0.<eos>«")
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as capture:
        console.print(report)
    assert "\x1b[2m<bos>Instruction:" in capture.get() and "\x1b[1m»Under the bridge 0.<eos>«" in capture.get()
    assert prepare(iter(rows), tokenizer, None, 64, 2).fingerprint == data.fingerprint
    with pytest.raises(DataError, match="has no tokenizer"):
        prepare(rows, None, None, 64, 2)
    with pytest.raises(DataError, match="the data holds no rows"):
        prepare(iter([]), tokenizer, None, 64, 2)


# --- ready batches ----------------------------------------------------------------------------------------------------


def ready(value, rows=2, length=4):
    ids = np.full((rows, length), value)
    return {"input_ids": ids, "labels": ids}


def first_ids(batches):
    return [int(batch["input_ids"][0, 0]) for batch in batches]


def test_masks_become_segments_and_positions():
    batch = {
        "input_ids": [[5, 6, 7, 8], [0, 0, 5, 6], [5, 6, 0, 0]],
        "labels": [[5, 6, -100, 8], [0, 0, 5, 6], [5, 6, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]],
    }
    done = complete(batch)
    assert list(done) == NAMES and {array.dtype for array in done.values()} == {np.dtype("int32")}
    assert done["labels"].tolist() == [[-100, 6, -100, 8], [-100, -100, -100, 6], [-100, 6, -100, -100]]
    assert done["segment_ids"].tolist() == batch["attention_mask"]
    assert done["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 1, 1, 1]]
    assert complete({**batch, "attention_mask": np.array(batch["attention_mask"], bool)})["segment_ids"].tolist() == batch["attention_mask"]  # fmt: skip


def test_segments_and_positions_make_each_other():
    ids = np.array([[5, 6, 7, 8, 9, 0]])
    segments, positions = [[1, 1, 1, 2, 3, 0]], [[0, 1, 2, 0, 0, 0]]
    from_segments = complete({"input_ids": ids, "labels": ids, "segment_ids": segments})
    from_positions = complete({"input_ids": ids, "labels": ids, "position_ids": positions, "attention_mask": ids > 0})
    for done in (from_segments, from_positions):
        assert done["segment_ids"].tolist() == segments
        assert done["position_ids"].tolist() == positions
        assert done["labels"].tolist() == [[-100, 6, 7, -100, -100, -100]]
    shifted = complete({"input_ids": ids, "labels": ids, "position_ids": [[3, 4, 5, 6, 7, 8]]})
    assert shifted["segment_ids"].tolist() == [[1] * 6] and shifted["position_ids"].tolist() == [[3, 4, 5, 6, 7, 8]]


def test_our_own_batches_stay_as_they_are():
    batches = list(Batches(dolly_like(50), 512, 4).epoch(0))
    assert same(batches, ReadyBatches(batches).epoch(0))
    without = [{name: batch[name] for name in ("input_ids", "labels", "segment_ids")} for batch in batches]
    assert same(batches, ({**b, "position_ids": b["position_ids"] * (b["segment_ids"] > 0)} for b in ReadyBatches(without).epoch(0)))  # fmt: skip


def test_collators_of_transformers():
    from transformers import DataCollatorWithFlattening

    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    done = complete(DataCollatorWithFlattening()(rows))
    assert done["segment_ids"].tolist() == [[1, 1, 1, 2, 2]] and done["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert done["labels"].tolist() == [[-100, 6, 7, -100, 9]]


def arrays_of(framework, rows):
    if framework == "list":
        return rows
    if framework == "numpy":
        return np.array(rows, np.uint16)
    if framework == "jax":
        return pytest.importorskip("jax.numpy").array(rows)
    if framework == "torch":
        return pytest.importorskip("torch").tensor(rows)
    if framework == "torch on a GPU":
        torch = pytest.importorskip("torch")

        class OnDevice:  # what a tensor on a GPU does
            def __array__(self, *args, **kwargs):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")

            def detach(self):
                return self

            def cpu(self):
                return torch.tensor(rows)

        return OnDevice()
    return pytest.importorskip("tensorflow").constant(rows, dtype="int64")


@pytest.mark.parametrize("framework", ["list", "numpy", "jax", "torch", "torch on a GPU", "tensorflow"])
def test_arrays_of_every_framework(framework):
    rows = [[5, 6, 7], [8, 9, 0]]
    done = complete({"input_ids": arrays_of(framework, rows), "labels": arrays_of(framework, rows)})
    assert done["input_ids"].tolist() == rows and done["labels"].tolist() == [[-100, 6, 7], [-100, 9, 0]]


IDS = np.ones((2, 3), int)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"input_ids": IDS}, "must be a dict with input_ids and labels, found input_ids"),
        ([1], "must be a dict with input_ids and labels, found list"),
        ({"input_ids": IDS, "labels": np.ones((2, 4), int)}, r"one shape .*'input_ids': \(2, 3\), 'labels': \(2, 4\)"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, r"one shape \(rows, length\), found .*\(3,\)"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": np.ones((2, 1, 3, 3), int)}, r"\(2, 1, 3, 3\)"),
        ({"input_ids": IDS, "labels": IDS * 1.0}, "labels must be integers, found float64"),
        ({"input_ids": IDS, "labels": [["a"]]}, "labels must be integers, found <U1"),
        ({"input_ids": [[1], [1, 2]], "labels": IDS}, "input_ids: a list cannot be made an array; rows of different"),
        ({"input_ids": IDS, "labels": -IDS}, "negative labels.*only -100 masks"),
        ({"input_ids": -IDS, "labels": IDS}, "negative input_ids"),
        ({"input_ids": IDS[:0], "labels": IDS[:0]}, "one shape"),
    ],
)
def test_errors_of_ready_batches(batch, says):
    with pytest.raises(DataError, match="batch 2 of epoch 1.*" + says):
        list(ReadyBatches([ready(1), batch]).epoch(0))


def test_labels_that_are_all_masked():
    masked = {**ready(1), "labels": np.full((2, 4), NO_LABEL)}
    assert len(list(ReadyBatches([masked, ready(1)]).epoch(0))) == 2
    with pytest.raises(DataError, match="all labels of the 2 batches of epoch 1 are -100"):
        list(ReadyBatches([masked, masked]).epoch(0))


class Shuffled:
    """Another order in each pass, as a DataLoader with a seeded generator has."""

    def __init__(self):
        self.draw = random.Random(0)
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return (ready(value) for value in self.draw.sample(range(100), 10))


class Stateful(Shuffled):
    """Can go on where it was, as torchdata's StatefulDataLoader can."""

    state = (0, 0)

    def __iter__(self):
        (epoch, begin), self.state = self.state, (0, 0)
        self.passes += 1
        for n in range(begin, 10):
            self.now = (epoch, n + 1)
            yield ready(n)

    def state_dict(self):
        return {"at": list(self.now)}

    def load_state_dict(self, state):
        self.state = tuple(state["at"])


@pytest.mark.parametrize("through_prepare", [True, False])
def test_resuming_replays_what_was_seen(through_prepare):
    def start():
        data = Shuffled()
        return prepare(data, None, None, 8, 2) if through_prepare else ReadyBatches(data), data

    whole, data = start()
    epochs = [first_ids(whole.epoch(n)) for n in range(3)]
    assert data.passes == 3 and epochs[0] != epochs[1]
    for epoch, begin in ((0, 0), (0, 4), (2, 0), (2, 7)):
        resumed, data = start()
        assert first_ids(resumed.epoch(epoch, begin)) == epochs[epoch][begin:]
        assert data.passes == epoch + 1
    validation, _ = start()
    assert len(list(validation.epoch(0))) == len(list(validation.epoch(0))) == 10  # no replay: each is a pass


def test_resuming_with_a_state_of_its_own():
    data = Stateful()
    whole = prepare(data, None, None, 8, 2)
    batches = whole.epoch(0)
    assert first_ids([next(batches) for _ in range(4)]) == [0, 1, 2, 3]
    state = whole.state_dict()
    data = Stateful()
    resumed = prepare(data, None, None, 8, 2)
    resumed.load_state_dict(state)
    assert first_ids(resumed.epoch(5, 4)) == [4, 5, 6, 7, 8, 9]
    assert data.passes == 2  # one to see what the data is, one to go on; none is replayed
    assert first_ids(resumed.epoch(6)) == list(range(10))
    assert ReadyBatches([ready(1)]).state_dict() == {}


def test_generators_are_read_once():
    data = prepare((ready(n) for n in range(5)), None, None, 8, 2)
    assert data.steps(0) is None and data.fingerprint is None
    assert first_ids(data.epoch(0)) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="no batch in epoch 2: a generator can be read once"):
        list(data.epoch(1))
    assert first_ids(prepare((ready(n) for n in range(5)), None, None, 8, 2).epoch(0, 3)) == [3, 4]


def test_lists_of_ready_batches():
    data = prepare([ready(n) for n in range(5)], None, None, 8, 2)
    assert data.steps(0) == 5 and "5 steps" in str(data.report())
    assert first_ids(data.epoch(0, 2)) == [2, 3, 4] and first_ids(data.epoch(1)) == [0, 1, 2, 3, 4]


def rows_for_loaders():
    draw = np.random.default_rng(0)
    return [{"input_ids": ids, "labels": ids} for ids in draw.integers(1, 100, (10, 6))]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_a_torch_data_loader_with_workers(context):
    data = pytest.importorskip("torch.utils.data")
    rows = rows_for_loaders()
    loader = data.DataLoader(rows, batch_size=4, num_workers=2, multiprocessing_context=context)
    source = prepare(loader, None, None, 8, 2)
    assert source.steps(0) == 3
    for epoch in range(2):
        batches = list(source.epoch(epoch))
        assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
        assert np.concatenate([batch["input_ids"] for batch in batches]).tolist() == [
            row["input_ids"].tolist() for row in rows
        ]


def test_tf_data_over_tf_records(tmp_path):
    tf = pytest.importorskip("tensorflow")
    rows = rows_for_loaders()
    path = str(tmp_path / "d.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for row in rows:
            feature = {k: tf.train.Feature(int64_list=tf.train.Int64List(value=v)) for k, v in row.items()}
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    spec = {name: tf.io.FixedLenFeature([6], tf.int64) for name in ("input_ids", "labels")}
    dataset = tf.data.TFRecordDataset(path).map(lambda raw: tf.io.parse_single_example(raw, spec)).batch(4)
    source = prepare(dataset, None, None, 8, 2)
    assert source.steps(0) is None
    for epoch, start in ((0, 0), (1, 1)):
        ids = np.concatenate([batch["input_ids"] for batch in source.epoch(epoch, start)])
        assert ids.tolist() == [row["input_ids"].tolist() for row in rows][4 * start :]
    assert prepare(dataset.apply(tf.data.experimental.assert_cardinality(3)), None, None, 8, 2).steps(0) == 3
