"""Questions in plain words, each with the modules in which a good answer stands.

Written from what the modules are for, not from what the search finds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the modules (with their submodules) that answer it."""

    text: str
    modules: tuple[str, ...]


QUESTIONS: tuple[Question, ...] = tuple(
    Question(text, tuple(modules.split()))
    for text, modules in (
        ("how do I read a zip archive without unpacking it?", "zipfile"),
        ("write a file into a compressed zip archive", "zipfile"),
        ("extract all members of a tar archive safely", "tarfile shutil"),
        ("open a gzip compressed file for reading text", "gzip"),
        ("parse command line arguments with options and subcommands", "argparse optparse getopt"),
        ("show a help message with the usage of a program", "argparse optparse"),
        ("send an email message through an SMTP server", "smtplib"),
        ("parse the headers of an email message", "email"),
        ("build a multipart mime message with an attachment", "email"),
        ("download a page from a url", "urllib"),
        ("split a url into scheme, host and path", "urllib"),
        ("handle cookies of an HTTP session", "http urllib"),
        ("write a simple HTTP server that serves files", "http"),
        ("encode an object as a JSON string", "json"),
        ("read rows from a comma separated csv file", "csv"),
        ("read options from an ini configuration file", "configparser"),
        ("compute the difference between two sequences of lines", "difflib"),
        ("find close matches for a misspelled word", "difflib"),
        ("draw random samples from a normal distribution", "random statistics"),
        ("shuffle a list in place", "random"),
        ("compute the median and standard deviation of data", "statistics"),
        ("exact decimal arithmetic with rounding and precision context", "decimal _pydecimal"),
        ("rational numbers with numerator and denominator", "fractions numbers"),
        ("date and time arithmetic with time zones", "datetime _pydatetime zoneinfo"),
        ("print a calendar of a month", "calendar"),
        ("run a subprocess and capture its output", "subprocess asyncio"),
        ("start worker processes in a pool and map a function over them", "multiprocessing concurrent"),
        ("share memory between processes", "multiprocessing"),
        ("run a function in a thread pool and wait for its future", "concurrent asyncio"),
        ("lock a critical section between threads with a condition variable", "threading"),
        ("run an event loop and schedule coroutines as tasks", "asyncio"),
        ("open a TCP connection with asynchronous streams", "asyncio"),
        ("write log messages to a rotating file handler", "logging"),
        ("configure loggers, handlers and formatters from a dictionary", "logging"),
        ("write unit tests with assertions and fixtures setUp and tearDown", "unittest"),
        ("replace an object with a mock during a test", "unittest"),
        ("test the interactive examples in docstrings", "doctest"),
        ("set a breakpoint and step through a program in the debugger", "pdb bdb"),
        ("profile how often and how long functions are called", "profile cProfile pstats"),
        ("measure the execution time of a small code snippet", "timeit"),
        ("trace memory allocations and take a snapshot", "tracemalloc"),
        ("print a traceback of an exception with its stack frames", "traceback"),
        ("inspect the signature of a function and its parameters", "inspect"),
        ("parse python source into an abstract syntax tree and walk its nodes", "ast"),
        ("disassemble bytecode instructions of a function", "dis"),
        ("tokenize python source code", "tokenize"),
        ("create a virtual environment with pip installed", "venv ensurepip"),
        ("import a module from a path with a custom finder and loader", "importlib imp pkgutil zipimport"),
        ("remove a directory tree and copy files recursively", "shutil"),
        ("join path components and resolve symbolic links", "pathlib posixpath ntpath os"),
        ("create a temporary file that is deleted when closed", "tempfile"),
        ("match file names against shell style wildcard patterns", "fnmatch glob"),
        ("count hashable items and find the most common elements", "collections"),
        ("a dictionary that remembers insertion order and can move keys to the end", "collections"),
        ("cache the results of a function with least recently used eviction", "functools"),
        ("a heap queue with priority push and pop", "heapq queue"),
        ("generate a dataclass with default fields", "dataclasses"),
        ("an enumeration whose members have unique values and flags", "enum"),
        ("pickle an object to bytes and restore it", "pickle pickletools copyreg"),
        ("a persistent dictionary stored in a database file", "shelve dbm"),
        ("pretty print nested data structures", "pprint"),
        ("wrap and fill paragraphs of text to a given width", "textwrap"),
        ("a window with buttons and labels in a graphical user interface", "tkinter"),
        ("draw with a turtle that moves forward and turns", "turtle"),
        ("parse an XML document and find elements", "xml"),
        ("escape special characters in html", "html xml"),
        ("connect to a mailbox with IMAP and search messages", "imaplib mailbox"),
        ("transfer files with FTP", "ftplib"),
        ("compare internet addresses and networks", "ipaddress"),
        ("wrap a socket with TLS and verify the certificate of the host", "ssl"),
        ("generate a secure random token for a password reset", "secrets uuid"),
        ("generate a universally unique identifier", "uuid"),
    )
)
