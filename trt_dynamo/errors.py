"""The errors that trt_dynamo raises. Everything else that escapes is torch's own, and is left alone."""

from __future__ import annotations


class TrtDynamoError(RuntimeError):
    """The parent of every error raised by trt_dynamo."""


class Unsupported(TrtDynamoError, NotImplementedError):
    """TensorRT (or this converter) cannot do it: the node stays in eager. The text is the reason, without the op's
    name.
    """


class ConversionError(TrtDynamoError):
    """A converter made something else than the graph says. This is a bug in the converter, never the user's fault."""


class BuildError(TrtDynamoError):
    """TensorRT refused to build an engine; the text ends with TensorRT's own words."""


class EngineError(TrtDynamoError):
    """An engine could not be loaded, bound or run."""


class FileError(TrtDynamoError):
    """A file of `trt_dynamo.save` is damaged, not signed with our key, or made for something else; the text says what
    differs."""


class AccuracyError(TrtDynamoError):
    """An engine's results are not eager's, as `verify` found. The text names the segment and the first bad node."""


class WeightsMoved(TrtDynamoError):
    """The weights changed while an engine was built from them. Never reaches a user: the next call asks again."""


class SettingsError(TrtDynamoError, ValueError):
    """An unknown option, or a value that does not parse. The text names the nearest valid choice."""


def words_of(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def in_a_line(error: BaseException, most: int = 500) -> str:
    """The words of an error, at most so many characters."""
    return cut(words_of(error), most)


def typed_in_a_line(error: BaseException, most: int = 500) -> str:
    """The error's type and what it says, in a line of at most so many characters."""
    return cut(f"{type(error).__name__}: {' '.join(str(error).split())}", most)


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
