"""Users' text files: encodings, tables, JSON, types."""

import gzip
import os

import pytest

from audiot.data.corpora.folder import read_labels
from audiot.data.corpora.librispeech import _read_list
from audiot.data.corpora.phone_labels import read_frame_labels
from audiot.data.labels import read_lexicon
from audiot.data.text import as_label, as_seconds, as_text, json_object, lines, read_text, rows
from audiot.downstream.verification import read_trials


def write(tmp_path, content, name="file.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Encodings


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("packed", [False, True])
def test_lines_are_the_same_in_every_form_of_utf_8(tmp_path, end, encoding, packed):
    content = end.join(["été HH", "", "  ", "東京\u2028 T ", ""]).encode(encoding)  # U+2028 ends no line
    path = write(tmp_path, gzip.compress(content) if packed else content)
    assert list(lines(path)) == [(1, "été HH"), (4, "東京\u2028 T")]
    assert read_text(path) == "été HH\n\n  \n東京\u2028 T \n"


READERS = {
    "label table": (read_labels, "path,keyword\na.wav,café\n"),
    "lexicon": (read_lexicon, "HELLO HH AH\nCAFé K AE\n"),
    "trials": (read_trials, "1 a b\n0 a café\n"),
    "list": (lambda path: _read_list(path, "data.phone_train"), "a\ncafé\n"),
    "frame labels": (lambda path: read_frame_labels(path, {"café": (400, 16000)}), "a 1\ncafé 1\n"),
}


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_takes_a_byte_order_mark_and_refuses_other_encodings_by_name(tmp_path, kind):
    read, content = READERS[kind]
    plain = read(write(tmp_path, content))
    assert read(write(tmp_path, content.encode("utf-8-sig"))) == plain
    assert read(write(tmp_path, content.replace("\n", "\r\n"))) == plain
    for encoding, message in {
        "latin-1": r"file\.txt:2: not UTF-8 \(byte 0xe9\): save the file as UTF-8",
        "utf-16": r"file\.txt is UTF-16, according to its first bytes: save it as UTF-8",
        "utf-16-le": r"file\.txt:1: a zero byte: not text, or not UTF-8: save it as UTF-8",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(write(tmp_path, content.encode(encoding).replace("\xe9\0".encode("latin-1"), b"e\0")))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_the_line_of_a_wrong_byte_is_right_in_a_long_file(tmp_path, end):
    content = [b"a line of the file"] * 5000
    content[4321] += b"\xff"
    with pytest.raises(ValueError, match=r"file\.txt:4322: not UTF-8 \(byte 0xff\)"):
        list(lines(write(tmp_path, end.join(content))))


def test_utf_16_is_text_where_it_may_be(tmp_path):
    for encoding in ("utf-16-le", "utf-16-be"):
        assert read_text(write(tmp_path, "\ufeffé\r\nb".encode(encoding)), utf_16=True) == "é\nb"
    with pytest.raises(ValueError, match=r"file\.txt begins like UTF-16 but is not: truncated data"):
        read_text(write(tmp_path, "é".encode("utf-16") + b"b"), utf_16=True)


def test_a_file_that_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", ".", "pipe"):  # a pipe that nobody writes to would be read for ever
        with pytest.raises(FileNotFoundError, match=r"there is no file "):
            list(lines(tmp_path / name))


# Tables


def test_a_table_gives_cells_without_the_blanks_around_them(tmp_path):
    content = '\n,path , label,a\n0, a.wav,08 ,\n,,,\n1,b.wav, "two, ""2""\nlines" ,x\n\n'
    path = write(tmp_path, content.replace('lines" ,', 'lines",'))
    assert list(rows(path, ["path"])) == [
        (3, {"path": "a.wav", "label": "08", "a": ""}),
        (5, {"path": "b.wav", "label": 'two, "2"\nlines', "a": "x"}),
    ]
    path = write(tmp_path, "path\tlabel\n a.wav\tone, two\n")
    assert list(rows(path, ["path"], "\t")) == [(2, {"path": "a.wav", "label": "one, two"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label,label \na,b,c\n", r"1: label is the name of several columns: rename all but one"),
        ("path,label\na,b\na\n", r"3: expected 2 values, one per column of the header, found 1"),
        ("path,label\na,b,c\n", r"2: expected 2 values, one per column of the header, found 3"),
        ('path,label\na,"b\nc,d\n', r"2: a quote that is opened in this row is not closed"),
        ('path,label\na,"b" c\n', r"2: ',' expected after '\"'"),
        pytest.param('path,label\na,b\nc,"' + "x\n" * 70000, r"3: field larger than field limit", id="long"),
    ],
)
def test_a_broken_table_is_refused_with_its_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"file\.txt:{message}"):
        list(rows(write(tmp_path, content), ["path"]))


# JSON


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1', r"not JSON: Expecting ',' delimiter at character 8"),
        ('{"a": {"b": [1, NaN]}}', r"a\.b\[1\] must be a number, found nan: write null for a missing value"),
        ('{"a": -Infinity}', r"a must be a number, found -inf"),
        ('{"a": 1e999}', r"a must be a number, found inf"),
        ('{"a": {"b": 1, "b": 2}}', r"b occurs twice in one object"),
        (r'{"a": "\ud83d"}', r"a has a lone surrogate, half a character: '\\ud83d'"),
        ("[1]", "a JSON object was expected, found list"),
        ("[" * 100_000, "its brackets are nested too deep"),
        ('{"a": ' + "1" * 5000 + "}", "integer string conversion"),
    ],
)
def test_what_is_no_json_object_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        json_object(line)


def test_a_json_object_comes_as_it_is():
    assert json_object('{"a": {"b": [1, 2.5, null, true, "é\\ud83d\\ude00"]}}') == {"a": {"b": [1, 2.5, None, True, "é😀"]}}


# Types


@pytest.mark.parametrize(
    ("value", "expected"), [("yes", "yes"), (" 08 ", "08"), (8, "8"), ("", None), (" \t", None), (None, None)]
)
def test_a_label_is_text_or_a_whole_number_and_a_blank_is_missing(value, expected):
    assert as_label(value, "label") == expected
    if not isinstance(value, int):
        assert as_text(value, "text") == expected


@pytest.mark.parametrize("value", [True, 1.0, ["a"], {"a": 1}, b"a"])
def test_other_types_are_refused_by_the_name_of_the_field(value):
    with pytest.raises(ValueError, match=r"speaker must be text or a whole number, found .*: put it in quotes, or leave it out"):
        as_label(value, "speaker")
    with pytest.raises(ValueError, match=r"text must be text, found .*: put it in quotes, or leave it out"):
        as_text(value, "text")


def test_labels_that_differ_in_case_or_normal_form_stay_different():
    assert len({as_label(value, "label") for value in ("é", "e\u0301", "É", "é ")}) == 3


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("-inf"), 1e308, 10**400, [1]])
def test_seconds_are_finite_numbers(value):
    assert [as_seconds(number, "offset") for number in (0, 1.5, -2)] == [0.0, 1.5, -2.0]
    with pytest.raises(ValueError, match="offset must be a number of seconds, found "):
        as_seconds(value, "offset")


def test_a_packed_file_that_is_neither_whole_nor_text_is_named(tmp_path):
    packed = bytearray(gzip.compress(b"path,label\n\xff\xfe,x\n"))
    packed[-8] ^= 1  # of the checksum at its end
    (tmp_path / "t.csv").write_bytes(packed)
    with pytest.raises(ValueError, match=r"t.csv: not UTF-8, and unreadable: CRC check failed"):
        list(rows(tmp_path / "t.csv", ["path"]))
