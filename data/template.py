"""A stranger's Jinja program: it runs in Jinja's sandbox and in a process of its own,
which may take two seconds and little memory.

    python data/template.py < {"template": ..., "variables": ...} and calls, one a line

What is written for a call is {"text": ...} or {"error": ...}. A program that takes more
than its share ends the process, whatever it does: loops in loops, 10**10**10,
"a" * 10**9, macros that call themselves.
"""

import json
import resource
import subprocess
import sys

SECONDS, MEMORY, LONGEST = 2, 2**29, 2**20  # of the processor; bytes; characters of one text


class Program:
    """A template, called with what it is to see. Variables: those of every call."""

    def __init__(self, template: str, variables: dict):
        self.process = subprocess.Popen([sys.executable, "-I", __file__], stdin=subprocess.PIPE, text=True,
                                        encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.send({"template": template, "variables": variables})

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, values: dict) -> None:
        try:
            print(json.dumps(values), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended, and will not answer

    def __call__(self, **variables) -> str:
        """Raises ValueError for what the program refuses, TimeoutError where it takes
        too much.
        """
        self.send(variables)
        line = self.process.stdout.readline()
        if not line:
            raise TimeoutError(f"a chat template takes more than {SECONDS} seconds or {MEMORY >> 20} MiB")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]


def serve() -> None:
    """The process's side."""
    import jinja2.ext  # comes with torch; only an import of a model needs it
    import jinja2.sandbox

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    task = json.loads(sys.stdin.readline())
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    for line in sys.stdin:
        try:
            program = env.from_string(task["template"])
            text = program.render(raise_exception=refuse, **task["variables"], **json.loads(line))
            answer = {"text": text} if len(text) <= LONGEST else {"error": "its text is too long"}
        except MemoryError:
            return
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
