from __future__ import annotations

import threading

from vlmport.runtime.engines import log as log_module
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.log import EngineLog, engine_logger, listening


def say(severity: str, text: str) -> None:
    bindings = load_bindings("tensorrt-rtx")
    engine_logger(bindings).log(getattr(bindings.ILogger, severity), text)


def test_a_process_has_one_logger() -> None:
    bindings = load_bindings("tensorrt-rtx")
    assert engine_logger(bindings) is engine_logger(bindings)


def test_messages_are_sorted_by_what_they_mean() -> None:
    with listening() as log:
        say("WARNING", "Unused Input: past")
        say("WARNING", "ModelImporter.cpp:1071: Make sure input ids has Int64 binding.")
        say("WARNING", "strange")
        say("WARNING", "strange")
        say("ERROR", "broken")
        say("INTERNAL_ERROR", "very broken")
        say("VERBOSE", "chatter")
    assert log.unused_inputs == ("past",)
    assert log.warnings == ("Unused Input: past", "strange")
    assert log.errors == ("broken", "very broken")
    assert "[ERROR] broken" in log.lines()
    assert not any("chatter" in line for line in log.lines())


def test_builds_in_threads_keep_their_messages_apart() -> None:
    logs: dict[str, EngineLog] = {}
    both = threading.Barrier(2)

    def work(name: str) -> None:
        with listening() as log:
            both.wait()
            say("ERROR", name)
            both.wait()
            logs[name] = log

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: log.errors for name, log in logs.items()} == {"a": ("a",), "b": ("b",)}


def test_a_thread_of_tensorrt_itself_is_heard() -> None:
    with listening() as log:
        thread = threading.Thread(target=say, args=("ERROR", "from elsewhere"))
        thread.start()
        thread.join()
    assert log.errors == ("from elsewhere",)


def test_an_inner_block_keeps_its_messages() -> None:
    with listening() as outer:
        with listening() as inner:
            say("ERROR", "inner")
        say("ERROR", "outer")
    assert (outer.errors, inner.errors) == (("outer",), ("inner",))


def test_the_reason_is_not_the_missing_gpu() -> None:
    missing = "cudaError 35: CUDA driver version is insufficient for CUDA runtime version"
    with listening() as log:
        assert log.reason == "TensorRT says no more"
        say("ERROR", missing)
        assert log.reason == missing
        say("ERROR", "no kernel\n for it")
        say("ERROR", missing)
    assert log.reason == "no kernel for it"


def test_garbage_may_speak_while_a_message_is_kept() -> None:
    spoken = threading.Event()

    def work() -> None:
        with listening() as log:
            with log_module._listeners_lock, log._lock:  # where a collection may begin
                say("ERROR", "gone")
            assert log.errors == ("gone",)
        spoken.set()

    threading.Thread(target=work, daemon=True).start()
    assert spoken.wait(20)
