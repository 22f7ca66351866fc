"""Formal verifiers: SMT-LIB assertions checked by z3, and proofs checked by Lean.

z3 is installed with the extra `formal`; `lean` must be on the PATH. Both verifiers report what is missing.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.data.answers import final_part, marked_answer
from posttrain.rewards.judging import column, failed
from posttrain.types import Json, RolloutError, Task, Verdict

EFFORT = 2_000_000
"""z3's resource limit (rlimit) per assertion, about a second. Unlike a time limit it is the same on every machine."""
LONGEST = 2_000
"""Maximum length of a formula in characters; longer ones fail."""
LEAN_SECONDS = 120.0
LEAN_HEARTBEATS = 400_000
"""Lean's own limit: allocations, in thousands, after which it gives up on a proof."""
LEAN_MEGABYTES = 4096
AXIOMS = {"propext", "Classical.choice", "Quot.sound"}
"""The axioms that a Lean proof may depend on: Lean's standard ones."""

_BLOCK = re.compile(r"```[a-zA-Z0-9]*\s*\n([^`]*)```")
_ALPHABET = re.compile(r"[A-Za-z0-9_ \n\t+*/%()<>=!,.-]*")
_FORBIDDEN = re.compile(
    # Anything that starts another command, executes code during elaboration, or leaves a gap in the proof.
    r"#\w|@\[|\b(?:sorry|admit|axiom|constant|opaque|unsafe|partial|extern|implemented_by|csimp|native_decide|native|"
    r"run_tac|run_cmd|run_elab|run_meta|by_elab|elab|elab_rules|macro|macro_rules|syntax|notation|infixl?|infixr|prefix|"
    r"postfix|simproc|declare_syntax_cat|import|open|export|set_option|attribute|namespace|section|end|variable|universe|"
    r"universes|include|omit|def|abbrev|theorem|lemma|example|instance|class|structure|inductive|mutual|deriving|private|"
    r"protected|public|meta|noncomputable|local|scoped|initialize|builtin_initialize|include_str|IO|System|Lean|Elab)\b"
)


def by_z3(task: Task, text: str) -> Verdict:
    """Passes if z3 proves, within EFFORT, that the final answer satisfies every assertion of the column `smtlib`.

    If the script's only unknowns are constants, the answer gives their values (`x = 3, y = 1/2`). If the column
    `arguments` names the parameters of a function `answer` declared by the script, the answer is that function's body,
    an expression such as `2 * x <= y and x >= 0`, and each assertion must hold for all values of the constants. Parts:
    1 or 0 for each assertion. Raises RolloutError if z3 is missing or the script is invalid.
    """
    z3 = _z3()
    context = z3.Context()
    script = column(task, "smtlib", str, "z3")
    try:
        assertions = list(z3.parse_smt2_string(script, ctx=context))
    except z3.Z3Exception as error:
        message = error.value.decode() if isinstance(error.value, bytes) else error.value
        raise RolloutError(f"task {task.id!r}: cannot parse its smtlib: {message:.200}.", boundary="reward") from None
    unknown = _declared(z3, assertions)
    if not assertions or not unknown:
        raise RolloutError(
            f"task {task.id!r}: its smtlib must contain at least one assertion about a declared unknown.",
            boundary="reward",
        )
    final = final_part(text)
    blocks = _BLOCK.findall(final)
    given = (blocks[-1] if blocks else marked_answer(final) or final).strip().strip("$`").strip()
    try:
        if task.meta.get("arguments") is None:
            claims = _substitute_values(z3, task, assertions, unknown, given, context)
        else:
            claims = _substitute_function(z3, task, assertions, unknown, given, context)
        parts = {f"assertion_{i}": float(_holds(z3, claim, context)) for i, claim in enumerate(claims, 1)}
    except (
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
        z3.Z3Exception,
    ) as error:
        return failed(f"cannot parse the answer: {error}"[:200])
    failures = [name for name, value in parts.items() if not value]
    detail = f"not proved: {', '.join(failures)}" if failures else "all assertions hold"
    return Verdict(float(not failures), not failures, detail, parts)


def has_z3() -> bool:
    """True if z3 is installed."""
    return importlib.util.find_spec("z3") is not None


def _z3() -> Any:
    try:
        import z3
    except ImportError:
        raise RolloutError(
            "the verifier 'z3' needs the z3 solver. Run pip install 'posttrain[formal]'.", boundary="reward"
        ) from None
    return z3


def _holds(z3: Any, claim: Any, context: Any) -> bool:
    """Whether z3 proves a claim for all values of its free constants. An unknown result counts as no."""
    solver = z3.Solver(ctx=context)
    solver.set("rlimit", EFFORT)
    solver.add(z3.Not(claim))
    return solver.check() == z3.unsat


def _declared(z3: Any, assertions: list[Any]) -> dict[str, Any]:
    """Name → declaration of every uninterpreted constant and function in the assertions."""
    declarations: dict[str, Any] = {}
    seen: set[int] = set()
    stack = list(assertions)
    while stack:
        node = stack.pop()
        if node.get_id() in seen:
            continue
        seen.add(node.get_id())
        if z3.is_quantifier(node):
            stack.append(node.body())
        elif z3.is_app(node):
            if node.decl().kind() == z3.Z3_OP_UNINTERPRETED:
                declarations[node.decl().name()] = node.decl()
            stack += node.children()
    return declarations


def _substitute_values(
    z3: Any, task: Task, assertions: list[Any], unknown: Mapping[str, Any], given: str, context: Any
) -> list[Any]:
    """Substitutes the values that the answer gives for the constants; the last one given counts."""
    pairs: list[tuple[Any, Any]] = []
    for name, declaration in sorted(unknown.items()):
        if declaration.arity():
            raise RolloutError(
                f"task {task.id!r}: its smtlib declares the function {name!r}. Name the function to be found `answer` "
                "and list its parameters in the column `arguments`.",
                boundary="reward",
            )
        number = r"[-−]?\s?\d{1,400}(?:\s?/\s?\d{1,400}|\.\d{1,400})?"
        found = re.findall(rf"(?<!\w){re.escape(name)}[\"'`]?\s*[=:]\s*[\"'`]?({number}|true|false)(?!\w)", given, re.I)
        if not found:
            raise ValueError(f"no value for {name}")
        value = re.sub(r"\s", "", found[-1].lower()).replace("−", "-")
        sort = declaration.range()
        if sort.kind() == z3.Z3_BOOL_SORT:
            if value not in ("true", "false"):
                raise ValueError(f"{name} must be true or false")
            pairs.append((declaration(), z3.BoolVal(value == "true", ctx=context)))
        elif sort.kind() == z3.Z3_REAL_SORT:
            pairs.append((declaration(), z3.RealVal(value, ctx=context)))
        elif sort.kind() == z3.Z3_INT_SORT:
            pairs.append((declaration(), z3.IntVal(int(value), ctx=context)))
        elif sort.kind() == z3.Z3_BV_SORT:
            pairs.append((declaration(), z3.BitVecVal(int(value), sort.size(), ctx=context)))
        else:
            raise RolloutError(
                f"task {task.id!r}: {name} has the sort {sort}; supported are Int, Real, Bool and BitVec.",
                boundary="reward",
            )
    return [z3.substitute(assertion, *pairs) for assertion in assertions]


def _substitute_function(
    z3: Any, task: Task, assertions: list[Any], unknown: Mapping[str, Any], given: str, context: Any
) -> list[Any]:
    """Substitutes the body that the answer gives for the function `answer`."""
    names = column(task, "arguments", (list, tuple), "z3")
    declaration = unknown.get("answer")
    if declaration is None or declaration.arity() != len(names):
        raise RolloutError(
            f"task {task.id!r}: its smtlib must contain an assertion about a function `answer` with the {len(names)} "
            f"arguments {', '.join(map(str, names))}.",
            boundary="reward",
        )
    sorts = [declaration.domain(i) for i in range(declaration.arity())]
    parameters = {name: z3.Const(name, sort) for name, sort in zip(names, sorts, strict=True)}
    body = _translate(z3, _parsed(given), parameters, context)
    if declaration.range().kind() == z3.Z3_REAL_SORT and z3.is_int(body):
        body = z3.ToReal(body)
    if body.sort() != declaration.range():
        raise ValueError(f"the expression has the sort {body.sort()}, expected {declaration.range()}")
    variables = [
        (parameter, z3.Var(i, sort)) for i, (parameter, sort) in enumerate(zip(parameters.values(), sorts, strict=True))
    ]
    return [z3.substitute_funs(a, (declaration, z3.substitute(body, *variables))) for a in assertions]


def _parsed(text: str) -> ast.expr:
    """Parses an expression of arithmetic, comparisons, and, or, not. Raises ValueError for anything else."""
    text = text.removeprefix("return ").strip()
    if len(text) > LONGEST or not _ALPHABET.fullmatch(text) or re.search(r"\d[A-Za-z_]|\*\*", text):
        raise ValueError("only names, numbers, + - * // %, comparisons, and, or, not are allowed")
    try:
        return ast.parse(f"({text}\n)", mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"not an expression: {error.msg}") from None


def _translate(z3: Any, node: ast.expr, names: Mapping[str, Any], context: Any) -> Any:
    """Translates an expression tree to a z3 term; `//` and `%` are SMT-LIB's div and mod."""

    def term(inner: ast.expr) -> Any:
        return _translate(z3, inner, names, context)

    match node:
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Constant(value=bool() as value):
            return z3.BoolVal(value, ctx=context)
        case ast.Constant(value=int() as value):
            return z3.IntVal(value, ctx=context)
        case ast.Constant(value=float()):
            return z3.RealVal(ast.unparse(node), ctx=context)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return z3.Not(term(operand))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -term(operand)
        case ast.BoolOp(op=op, values=parts):
            return (z3.And if isinstance(op, ast.And) else z3.Or)(*map(term, parts))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return z3.If(term(test), term(body), term(orelse))
        case ast.Call(func=ast.Name(id="implies"), args=[left, right], keywords=[]):
            return z3.Implies(term(left), term(right))
        case ast.BinOp(left=left, op=op, right=right):
            return _arithmetic(z3, op, term(left), term(right))
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [term(side) for side in (left, *others)]
            return z3.And(*(_comparison(op, a, b) for op, a, b in zip(ops, sides, sides[1:], strict=False)))
        case _:
            raise ValueError(f"{ast.unparse(node)[:40]!r} is not supported")


def _arithmetic(z3: Any, op: ast.operator, a: Any, b: Any) -> Any:
    whole = z3.is_int(a) and z3.is_int(b)
    match op:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
        case ast.Mod() if whole:
            return a % b
        case ast.FloorDiv() if whole:
            return a / b
        case ast.Div() if not whole:
            return a / b
        case _:
            raise ValueError("// and % need Int operands, / needs Real operands")


def _comparison(op: ast.cmpop, a: Any, b: Any) -> Any:
    match op:
        case ast.Eq():
            return a == b
        case ast.NotEq():
            return a != b
        case ast.Lt():
            return a < b
        case ast.LtE():
            return a <= b
        case ast.Gt():
            return a > b
        case ast.GtE():
            return a >= b
        case _:
            raise ValueError("supported comparisons are ==, !=, <, <=, > and >=")


def by_lean(task: Task, text: str) -> Verdict:
    """Passes if Lean accepts the final answer as a proof of the column `statement` that depends on AXIOMS only.

    `statement` is `theorem NAME … : PROPOSITION`; the optional column `preamble` (imports) precedes it. The answer, the
    whole final part or its last ``` block, is what follows `:=`. Answers with keywords that start other commands or
    execute code fail without being run; even so, Lean runs with your permissions. Raises RolloutError if `lean` is not
    on the PATH.
    """
    lean = shutil.which("lean")
    if lean is None:
        raise RolloutError(
            "the verifier 'lean' needs the program `lean` on the PATH. Install Lean 4 from lean-lang.org.",
            boundary="reward",
        )
    statement = column(task, "statement", str, "lean").strip().removesuffix(":=").strip()
    name = re.match(r"(?:theorem|lemma)\s+([\w.']+)", statement)
    if name is None:
        raise RolloutError(f"task {task.id!r}: its statement must begin with `theorem NAME`.", boundary="reward")
    final = final_part(text)
    blocks = _BLOCK.findall(final)
    proof = (blocks[-1] if blocks else final).strip().removeprefix(":=").strip()
    if not proof:
        return failed("no proof")
    if word := _FORBIDDEN.search(proof):
        return failed(f"{word.group()!r} is not allowed in a proof")
    head = f"{task.meta.get('preamble') or ''}\n{statement} :=\n{proof}\n"
    messages = _lean_messages(lean, f"{head}\n#print axioms {name[1]}\n")
    if messages is None:
        return failed(f"Lean took more than {LEAN_SECONDS:g} seconds")
    errors = [m for m in messages if m.get("severity") == "error"]
    if errors:
        return failed(f"Lean: {errors[0].get('data', '')}"[:200])
    line = head.count("\n") + 2
    output = [str(m.get("data", "")) for m in messages if (m.get("pos") or {}).get("line") == line]
    if len(output) != 1 or name[1] not in output[0]:
        return failed("Lean did not reach the end of the proof")
    axioms = re.search(r"depends on axioms:\s*\[([^\]]*)\]", output[0])
    used = {axiom.strip() for axiom in axioms[1].split(",")} if axioms else set[str]()
    if not used <= AXIOMS or not (axioms or "does not depend on any axioms" in output[0]):
        return failed(f"depends on {', '.join(sorted(used - AXIOMS)) or output[0][:80]}")
    return Verdict(1.0, True, "proved")


def _lean_messages(lean: str, source: str) -> list[Json] | None:
    """Lean's messages about a source file, or None if it timed out."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "Answer.lean"
        file.write_text(source, encoding="utf-8", errors="replace")
        command = [lean, "--json", f"--memory={LEAN_MEGABYTES}", f"--timeout={LEAN_HEARTBEATS}", str(file)]
        environment = {key: os.environ[key] for key in ("PATH", "HOME", "ELAN_HOME", "LEAN_PATH") if key in os.environ}
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=LEAN_SECONDS,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return None
    messages: list[Json] = []
    for line in done.stdout.splitlines():
        try:
            message = json.loads(line)
        except ValueError:
            message = line
        messages.append(message if isinstance(message, dict) else {"severity": "error", "data": line})
    if done.returncode and not any(m.get("severity") == "error" for m in messages):
        messages.append({"severity": "error", "data": f"exit code {done.returncode}: {done.stderr[-150:]}"})
    return messages
