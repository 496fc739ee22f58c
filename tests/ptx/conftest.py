from tests.ops.conftest import one_thread, poisoned_memory

__all__ = ["one_thread", "poisoned_memory"]
