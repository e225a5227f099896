"""Puts SpeeD into one of diffusers' training scripts.

    python docs/apply_speed.py train_dreambooth.py                                 # prints a diff
    python docs/apply_speed.py train_dreambooth.py --output train_dreambooth_speed.py

Three places change: where the scheduler is made, where timesteps are drawn, where the loss is reduced. They are found
by their form, so scripts with other line breaks and names will do. Exit code 1: a place was not found or has a form
that is not known; nothing is written then. Exit code 2: wrong input.
"""

import argparse
import ast
import difflib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# What speed_scheduler takes. The noise of Euler's kin is not scaled as in training, so DDPM's class draws and weighs.
TRAINED = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "CogVideoXDPMScheduler", "CogVideoXDDIMScheduler")
FLOWS = ("FlowMatchEulerDiscreteScheduler",)
BESIDE = ("EulerDiscreteScheduler",)
MSE = ("F.mse_loss", "torch.nn.functional.mse_loss", "nn.functional.mse_loss")
ERRORS = (*MSE, "conditional_loss", "F.l1_loss", "F.huber_loss", "F.smooth_l1_loss")
WEIGHTING_SCHEMES = "compute_loss_weighting_for_sd3"
PER_IMAGE = (".mean([1, 2, 3])", ".sum([1, 2, 3])", ".mean(dim=[1, 2, 3])", ".mean(dim=(1, 2, 3))")


class Refused(Exception):
    """The script has a form that is not known; the message says which and where."""


@dataclass
class Draw:
    """Where timesteps are drawn: statements to replace, and what the new one needs."""

    statements: list[ast.stmt]
    timesteps: str
    scheduler: str
    call: str
    end: str = ""


@dataclass
class Script:
    """A training script's source, its syntax tree, and the edits to make, as offsets in its bytes."""

    source: str
    edits: list[tuple[int, int, str]] = field(default_factory=list)
    report: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data = self.source.encode("utf-8")
        self.newline = "\r\n" if b"\r\n" in self.data else "\n"
        self.tree = ast.parse(self.data)
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents:
            node = self.parents[node]
            yield node

    def function(self, node: ast.AST) -> ast.AST:
        functions = (ast.FunctionDef, ast.Lambda, ast.Module)
        return next((found for found in self.ancestors(node) if isinstance(found, functions)), self.tree)

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.span(node)
        return self.data[start:end].decode("utf-8")

    def replace(self, node: ast.expr | ast.stmt, text: str) -> None:
        self.edits.append((*self.span(node), text))

    def remove(self, statement: ast.stmt) -> None:
        assert statement.end_lineno is not None
        self.edits.append((self.starts[statement.lineno - 1], self.starts[statement.end_lineno], ""))

    def insert_after(self, statement: ast.stmt, *lines: str) -> None:
        """New lines below a statement and what follows it on its line, as far to the right as it."""
        assert statement.end_lineno is not None
        end = self.starts[statement.end_lineno]
        indent = " " * statement.col_offset
        self.edits.append((end, end, "".join(indent + line + self.newline for line in lines)))

    def insert_before(self, statement: ast.stmt, line: str) -> None:
        start = self.starts[statement.lineno - 1]
        self.edits.append((start, start, " " * statement.col_offset + line + self.newline))

    def assignments(self, within: ast.AST) -> Iterator[tuple[str, ast.Assign]]:
        """Assignments to one name, in the order of their lines."""
        found = [node for node in ast.walk(within) if isinstance(node, ast.Assign) and len(node.targets) == 1]
        for node in sorted(found, key=lambda node: node.lineno):
            if isinstance(node.targets[0], ast.Name):
                yield node.targets[0].id, node

    def result(self) -> str:
        data = self.data
        for start, end, text in sorted(self.edits, reverse=True):
            data = data[:start] + text.encode("utf-8") + data[end:]
        text = data.decode("utf-8")
        ast.parse(text)
        return text

    def note(self, node: ast.stmt | ast.expr, text: str) -> None:
        self.report.append(f"line {node.lineno}: {text}")


def called(node: ast.AST | None) -> str:
    """The dotted name that is called; empty if it is no call."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def without(node: ast.expr, *methods: str) -> ast.expr:
    """The expression without calls of these methods at its end."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in methods:
        node = node.func.value
    return node


def names(node: ast.AST) -> set[str]:
    return {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((entry.value for entry in call.keywords if entry.arg == name), None)


def calls_in(node: ast.AST, wanted: tuple[str, ...]) -> list[ast.Call]:
    return [found for found in ast.walk(node) if isinstance(found, ast.Call) and called(found) in wanted]


def reduction(call: ast.Call) -> str | None:
    """The reduction of a loss function; None if it is computed."""
    value = keyword(call, "reduction")
    if value is None:
        return "mean"
    return str(value.value) if isinstance(value, ast.Constant) else None


def schedulers(script: Script) -> tuple[dict[str, list[tuple[ast.Assign, str]]], dict[str, tuple[ast.Assign, str]]]:
    """Who makes schedulers, by name: statement and class; and copies of them: statement and what is copied."""
    made: dict[str, list[tuple[ast.Assign, str]]] = {}
    copies: dict[str, tuple[ast.Assign, str]] = {}
    for name, node in script.assignments(script.tree):
        callee = called(node.value).removesuffix(".from_pretrained").removesuffix(".from_config")
        if callee.endswith("Scheduler"):
            made.setdefault(name, []).append((node, callee.rpartition(".")[2]))
        elif isinstance(node.value, ast.Call) and called(node.value) in ("copy.deepcopy", "deepcopy", "copy.copy"):
            copies[name] = (node, ast.unparse(node.value.args[0]))
    return made, {name: copy for name, copy in copies.items() if copy[1] in made}


def scheduler_of_length(node: ast.expr, known: set[str]) -> str | None:
    """The scheduler whose number of timesteps this is."""
    for name in known:
        if ast.unparse(node) in (f"{name}.config.num_train_timesteps", f"{name}.num_train_timesteps", f"len({name})"):
            return name
    return None


def size_of(script: Script, call: ast.Call) -> str | None:
    """The batch size that a random tensor of one dimension, or diffusers' density, is made with."""
    size = keyword(call, "batch_size") or keyword(call, "size")
    if size is None and call.args:
        size = call.args[2] if called(call) == "torch.randint" and len(call.args) > 2 else call.args[0]
    if isinstance(size, ast.Tuple | ast.List):
        return script.text(size.elts[0]) if len(size.elts) == 1 else None
    return script.text(size) if size is not None and called(call).startswith("compute_density") else None


def drawn_on(script: Script, call: ast.Call) -> str:
    """The device and the generator of a random call, as arguments that follow the batch size."""
    named = ((name, keyword(call, name)) for name in ("device", "generator"))
    return "".join(f", {name}={script.text(value)}" for name, value in named if value is not None)


def randint_draw(script: Script, name: str, node: ast.Assign, known: set[str]) -> Draw | None:
    """timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch,), device=...).long()"""
    call = without(node.value, "long", "to")
    if called(call) != "torch.randint" or not isinstance(call, ast.Call):
        return None
    high = keyword(call, "high") or (call.args[1] if len(call.args) > 1 else None)
    low = keyword(call, "low") or (call.args[0] if call.args else None)
    scheduler = scheduler_of_length(high, known) if high is not None else None
    if scheduler is None or not (isinstance(low, ast.Constant) and low.value == 0):
        return None
    size = size_of(script, call)
    if size is None:
        return None
    end = script.text(node.value)[len(script.text(call)) :].removesuffix(".long()")
    return Draw([node], name, scheduler, size + drawn_on(script, call), end)


def rand_draw(script: Script, name: str, node: ast.Assign, known: set[str]) -> Draw | None:
    """timesteps = torch.rand((batch,), device=...), followed by what makes it an index."""
    call = node.value
    if called(call) != "torch.rand" or not isinstance(call, ast.Call):
        return None
    block = block_of(script, node)
    statements: list[ast.stmt] = [node]
    for later in block[block.index(node) + 1 :]:
        if not (isinstance(later, ast.Assign) and ast.unparse(later.targets[0]) == name):
            break
        if name not in names(later.value) or not names(later.value) <= {name, "torch", *known}:
            break
        statements.append(later)
    used = set().union(*(names(statement) for statement in statements)) & known
    size = size_of(script, call)
    if len(used) != 1 or size is None or ".long()" not in "".join(script.text(s) for s in statements):
        return None
    scheduler = used.pop()
    cast = f".to({scheduler}.timesteps.dtype)"
    end = cast if any(cast in script.text(statement) for statement in statements) else ""
    return Draw(statements, name, scheduler, size + drawn_on(script, call), end)


def table_draw(script: Script, name: str, node: ast.Assign, known: set[str], flows: set[str]) -> Draw | None:
    """timesteps = scheduler.timesteps[indices], of a flow; indices from a density over [0, 1) or torch.randint."""
    value = without(node.value, "to", "long")
    if not (isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Name)):
        return None
    scheduler = ast.unparse(value.value).removesuffix(".timesteps")
    if scheduler not in flows or ast.unparse(value.value) == scheduler:
        return None
    function, end = script.function(node), script.text(node.value)[len(script.text(value)) :]
    index = single_assignment(script, function, value.slice.id, node)
    if any(keyword(call, "generator") is not None for call in calls_in(index, ("torch.randint",))):
        raise Refused(f"line {index.lineno}: its generator would not be that of the new draw")
    drawn = randint_draw(script, value.slice.id, index, known)
    if drawn:
        return Draw([index, node], name, scheduler, drawn.call.partition(",")[0], end)
    share = without(index.value, "long", "to")
    if not (isinstance(share, ast.BinOp) and isinstance(share.op, ast.Mult)):
        raise Refused(f"line {index.lineno}: it is not known how {value.slice.id} is drawn")
    factors = [factor for factor in (share.left, share.right) if isinstance(factor, ast.Name)]
    if len(factors) != 1 or not any(scheduler_of_length(f, known) for f in (share.left, share.right)):
        raise Refused(f"line {index.lineno}: it is not known how {value.slice.id} is drawn")
    source = single_assignment(script, function, factors[0].id, index)
    random = without(source.value, "to")
    if called(random) == "torch.sigmoid" and isinstance(random, ast.Call):
        random = next(iter(calls_in(random.args[0], ("torch.randn", "torch.normal"))), random)
    if isinstance(random, ast.Call) and keyword(random, "generator") is not None:
        raise Refused(f"line {source.lineno}: its generator would not be that of the new draw")
    known_draws = ("compute_density_for_timestep_sampling", "torch.rand", "torch.randn", "torch.normal")
    size = size_of(script, random) if isinstance(random, ast.Call) and called(random) in known_draws else None
    if size is None:
        raise Refused(f"line {source.lineno}: it is not known how {factors[0].id} is drawn")
    return Draw([source, index, node], name, scheduler, size, end)


def single_assignment(script: Script, function: ast.AST, name: str, user: ast.Assign) -> ast.Assign:
    """The assignment to a name in the block of its only use."""
    block = block_of(script, user)
    found = [node for other, node in script.assignments(function) if other == name]
    uses = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == name]
    if len(found) != 1 or found[0] not in block:
        raise Refused(f"line {user.lineno}: {name} is not assigned once, in the same block")
    if len(uses) != 2:
        other = next(use.lineno for use in uses if not found[0].lineno <= use.lineno <= (user.end_lineno or 0))
        raise Refused(f"line {other}: {name} is used again, so the noise need not be that of the timesteps")
    return found[0]


def block_of(script: Script, statement: ast.stmt) -> list[ast.stmt]:
    parent = script.parents[statement]
    for part in ("body", "orelse", "finalbody"):
        block = getattr(parent, part, None)
        if isinstance(block, list) and statement in block:
            return block
    return [statement]


def find_draws(script: Script, known: set[str], flows: set[str]) -> list[Draw]:
    """All places where timesteps are drawn."""
    found: list[Draw] = []
    refusals: list[Refused] = []
    for name, node in script.assignments(script.tree):
        try:
            drawn = table_draw(script, name, node, known, flows) or rand_draw(script, name, node, known)
            if drawn is None:
                drawn = randint_draw(script, name, node, known)
                indexed = f".timesteps[{name}]" in script.source
                if drawn and (indexed or drawn.scheduler in flows):
                    drawn = None  # what it draws are indices, of which timesteps are made elsewhere
        except Refused as refusal:
            refusals.append(refusal)
            continue
        if drawn:
            found.append(drawn)
    if refusals:
        raise refusals[0]
    return found


def branch(script: Script, node: ast.AST, word: str) -> tuple[str, bool] | None:
    """The nearest condition above a statement that has the word, and whether the statement is reached if it holds."""
    child = node
    for ancestor in script.ancestors(node):
        if isinstance(ancestor, ast.If) and word in ast.unparse(ancestor.test):
            return ast.unparse(ancestor.test), child in ancestor.body
        child = ancestor
    return None


def apply_speed(source: str) -> tuple[str, list[str]]:
    """The script with SpeeD, and what has been done, a line each.

    Raises:
        Refused: One of the three places was not found, or has a form that is not known.
        SyntaxError: The source is not Python.
    """
    script = Script(source)
    if "speed_diffusers" in source:
        raise Refused("the script has SpeeD already")
    made, copies = schedulers(script)
    if not made:
        raise Refused("no scheduler of diffusers is made")
    classes = {name: {cls for _, cls in places} for name, places in made.items()}
    classes |= {name: classes[origin] for name, (_, origin) in copies.items()}
    flows = {name for name, found in classes.items() if found & set(FLOWS)}
    draws = find_draws(script, set(classes), flows)
    if not draws:
        raise Refused("no place that draws timesteps for a scheduler of this script was found")
    if len({(d.scheduler, d.timesteps, script.function(d.statements[0])) for d in draws}) != 1:
        lines = ", ".join(str(d.statements[0].lineno) for d in draws)
        raise Refused(f"lines {lines}: timesteps are drawn in more than one way")
    scheduler = draws[0].scheduler
    around = [script.function(draws[0].statements[0]), *script.ancestors(draws[0].statements[0])]
    made = {name: [(n, cls) for n, cls in places if script.function(n) in around] for name, places in made.items()}
    speed = change_scheduler(script, scheduler, classes[scheduler], made, copies)
    for drawn in draws:
        change_draw(script, drawn, speed)
    Losses(script, draws, speed).change()
    add_import(script, "SpeeDDDPMScheduler" if speed != scheduler else "speed_scheduler")
    script.report.sort(key=lambda line: int(line.split(":")[0].split()[1]))
    return script.result(), script.report


def change_scheduler(
    script: Script,
    name: str,
    classes: set[str],
    made: dict[str, list[tuple[ast.Assign, str]]],
    copies: dict[str, tuple[ast.Assign, str]],
) -> str:
    """Gives the scheduler SpeeD where it is made or copied; returns the name that draws and weighs."""
    if name in copies:
        node, origin = copies[name]
        script.replace(node.value, f"speed_scheduler({origin})")
        script.note(node, f"{name} = speed_scheduler({origin})")
        return name
    if not made[name]:
        raise Refused(f"{name} is made in another function than the one that draws timesteps")
    if not classes & {*TRAINED, *FLOWS, *BESIDE}:
        raise Refused(f"line {made[name][0][0].lineno}: {', '.join(sorted(classes))} is not known to SpeeD")
    places = {outermost_choice(script, node, len(made[name])) for node, _ in made[name]}
    for place in sorted(places, key=lambda place: place.lineno):
        if classes <= set(BESIDE):
            script.insert_after(place, f"{name}_speed = SpeeDDDPMScheduler.from_config({name}.config)")
            script.note(place, f"{name}_speed = SpeeDDDPMScheduler.from_config({name}.config), beside {name}")
        else:
            script.insert_after(place, f"{name} = speed_scheduler({name})")
            script.note(place, f"{name} = speed_scheduler({name})")
    if classes <= set(BESIDE):
        return f"{name}_speed"
    for call in ast.walk(script.tree):
        value = keyword(call, "scheduler") if isinstance(call, ast.Call) else None
        if isinstance(value, ast.Name) and value.id == name and "Pipeline" in called(call):
            script.replace(value, f"{name}.to_inference()")
            script.note(value, f"the pipeline gets {name}.to_inference()")
    return name


def outermost_choice(script: Script, node: ast.stmt, makers: int) -> ast.stmt:
    """The statement itself; or, where several branches make a scheduler, the outermost `if` around them."""
    if makers == 1:
        return node
    found: ast.stmt = node
    for ancestor in script.ancestors(node):
        if not isinstance(ancestor, ast.If):
            break
        found = ancestor
    return found


def change_draw(script: Script, drawn: Draw, speed: str) -> None:
    *before, last = drawn.statements
    for statement in before:
        script.remove(statement)
    new = f"{drawn.timesteps} = {speed}.sample_timesteps({drawn.call}){drawn.end}"
    script.replace(last, new)
    script.note(drawn.statements[0], new)


class Losses:
    """The losses of the function that draws timesteps, and their weights.

    Where the batch holds images for prior preservation, the weights are chunked as the target is.

    Args:
        script: The script.
        draws: Where timesteps are drawn.
        speed: The name of the scheduler that weighs.
    """

    def __init__(self, script: Script, draws: list[Draw], speed: str) -> None:
        self.script = script
        self.first = draws[0].statements[0]
        self.function = script.function(self.first)
        self.timesteps = draws[0].timesteps
        drawn = {statement for draw in draws for statement in draw.statements}
        self.later = [
            (name, node)
            for name, node in script.assignments(self.function)
            if node.lineno > self.first.lineno and node not in drawn and script.function(node) is self.function
        ]
        self.weights = f"{speed}.loss_weights({self.timesteps}{'' if speed == draws[0].scheduler else '.long()'})"
        schemes = [name for name, node in self.later if called(node.value) == WEIGHTING_SCHEMES]
        self.weighting = schemes[0] if schemes else None
        self.target_chunk, self.prior, self.weighting_chunked = find_chunks(self.function, self.first, self.weighting)
        self.handled: set[ast.Call] = set()
        self.chunk_weights = False

    def change(self) -> None:
        """Edits all of them.

        Raises:
            Refused: There is none of a known form, or one that is not known.
        """
        check_noise(self.function)
        check_timesteps_stay(self.script, self.later, self.timesteps)
        changed = [self.change_scheme(name, node) or self.change_loss(name, node) for name, node in self.later]
        for call in calls_in(self.function, ERRORS):
            if call.lineno > self.first.lineno and call not in self.handled:
                raise Refused(f"line {call.lineno}: it is not known how this error becomes the loss")
        if not any(changed):
            raise Refused(f"no loss after line {self.first.lineno} has a form that is known")
        if self.target_chunk is not None:
            self.chunk(self.target_chunk)
        if "precondition_outputs" in self.script.source and self.weighting is not None:
            note = "train with --precondition_outputs 0: SpeeD's weights are those of the velocity's error"
            self.script.note(self.first, note)

    def change_scheme(self, name: str, node: ast.Assign) -> bool:
        """Puts SpeeD's weights in the place of SD3's weighting schemes."""
        value = node.value
        if called(value) != WEIGHTING_SCHEMES or not isinstance(value, ast.Call):
            return False
        new = f"{self.weights}.view({self.script.text(keyword(value, 'sigmas') or value.args[1])}.shape)"
        self.script.replace(value, new)
        self.script.note(node, f"{name} = {new}, in place of --weighting_scheme's")
        return True

    def change_loss(self, name: str, node: ast.Assign) -> bool:
        """Weighs a loss where its mean over the batch is taken; False if this is no such place."""
        script, value = self.script, node.value
        errors = calls_in(value, ERRORS)
        if self.left_alone(node, errors):
            return False
        weights = self.weights
        if self.target_chunk is not None:
            weights = "speed_weights_prior" if names(value) & self.prior else "speed_weights"
        if called(value) == "torch.mean" and ".reshape(" in script.text(value) and "loss" in name:
            script.insert_after(node, f"{name} = {weights} * {name}")
        elif "loss" in name and is_mean_of_means(script, value):
            assert isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)
            per_image = script.text(value.func.value)
            per_image = f"({per_image})" if isinstance(value.func.value, ast.BinOp) else per_image
            script.replace(value, f"({weights} * {per_image}).mean()")
        elif len(errors) == 1 and value is errors[0] and reduction(errors[0]) == "mean":
            change_reduction(script, errors[0])
            script.insert_after(node, f"{name} = ({weights}.view(-1, *[1] * ({name}.ndim - 1)) * {name}).mean()")
        elif len(errors) == 1 and reduction(errors[0]) == "none" and isinstance(script.parents[errors[0]], ast.BinOp):
            prediction = script.text(without(errors[0].args[0], "float"))
            shaped = f"{weights}.view(-1, *[1] * ({prediction}.ndim - 1))"
            script.replace(errors[0], f"{shaped} * {script.text(errors[0])}")
        elif len(errors) == 1 and value is errors[0] and reduction(errors[0]) == "none":
            self.handled |= set(errors)  # the statement that takes the mean is the one to change
            return False
        else:
            return False
        self.handled |= set(errors)
        self.chunk_weights = self.target_chunk is not None
        script.note(node, f"{name} is weighed by {weights}")
        return True

    def left_alone(self, node: ast.Assign, errors: list[ast.Call]) -> bool:
        """Whether a statement weighs in its own way, or by a weighting that SpeeD's has replaced."""
        snr = branch(self.script, node, "snr_gamma")
        if snr is not None and ("is None" in snr[0]) != snr[1]:
            if errors:
                self.script.note(node, "--snr_gamma's branch is left alone: its own weights in place of SpeeD's")
            self.handled |= set(errors)
            return True
        if self.weighting is not None and names(node.value) & {self.weighting, f"{self.weighting}_prior"}:
            if names(node.value) & self.prior and not self.weighting_chunked:
                replace_names(self.script, node.value, self.weighting, f"{self.weighting}_prior")
            return not errors
        if branch(self.script, node, "weighting is not None") == ("weighting is not None", True):
            self.script.note(node, "left alone: speed_scheduler refuses the schedulers that come here")
            return True
        return False

    def chunk(self, target_chunk: ast.stmt) -> None:
        """Chunks the weights as the target is."""
        if self.weighting is not None and not self.weighting_chunked:
            halves = f"{self.weighting}, {self.weighting}_prior"
            self.script.insert_after(target_chunk, f"{halves} = torch.chunk({self.weighting}, 2, dim=0)")
            self.script.note(target_chunk, f"{self.weighting} is chunked as the target is")
        if self.chunk_weights:
            before = outermost_condition(self.script, target_chunk, "prior")
            self.script.insert_before(before, f"speed_weights = {self.weights}")
            halves = "speed_weights, speed_weights_prior"
            self.script.insert_after(target_chunk, f"{halves} = torch.chunk(speed_weights, 2, dim=0)")
            self.script.note(target_chunk, "the weights are chunked as the target is")


def is_mean_of_means(script: Script, value: ast.expr) -> bool:
    """Whether this is X.mean(), where X has one entry per image."""
    text = script.text(value)
    return called(value).endswith(".mean") and text.endswith(".mean()") and any(form in text for form in PER_IMAGE)


def check_noise(function: ast.AST) -> None:
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and ast.unparse(node).replace("1.0", "1") == "(1 - sigmas) * noise":
            raise Refused(f"line {node.lineno}: noise and images change places, so sigma = 1 is no noise at all")


def check_timesteps_stay(script: Script, later: list[tuple[str, ast.Assign]], timesteps: str) -> None:
    for name, node in later:
        if name == timesteps:
            plain = without(node.value, "long", "to", "repeat", "int", "contiguous")
            if isinstance(plain, ast.Name) and plain.id == timesteps:
                continue
            if called(plain) == "torch.multinomial":
                script.note(node, "the other branch, whose timesteps are drawn with a bias of its own, is left alone")
            elif isinstance(plain, ast.Subscript) and ast.unparse(plain.value).endswith(".timesteps"):
                script.note(node, "the other branch is left alone: speed_scheduler refuses its schedulers")
            else:
                raise Refused(f"line {node.lineno}: {timesteps} are changed after they were drawn")


def find_chunks(function: ast.AST, first: ast.stmt, weighting: str | None) -> tuple[ast.Assign | None, set[str], bool]:
    """The statement that chunks the target for prior preservation, the names of the prior's half, and whether the
    weighting is chunked too."""
    target_chunk, prior, weighting_chunked = None, set(), False
    for node in ast.walk(function):
        if not (
            isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and node.lineno > first.lineno
        ):
            continue
        if called(node.value) != "torch.chunk" or not isinstance(node.value, ast.Call):
            continue
        dim = keyword(node.value, "dim")
        if dim is not None and not (isinstance(dim, ast.Constant) and dim.value == 0):
            continue
        parts = [part.id for part in node.targets[0].elts if isinstance(part, ast.Name)]
        if len(parts) != 2 or ast.unparse(node.value.args[0]) != parts[0]:
            continue
        prior.add(parts[1])
        weighting_chunked = weighting_chunked or parts[0] == weighting
        if parts[0].startswith("target"):
            target_chunk = node
    return target_chunk, prior if target_chunk is not None else set(), weighting_chunked


def outermost_condition(script: Script, node: ast.stmt, word: str) -> ast.stmt:
    """The outermost `if` around a statement whose condition has the word; the statement itself without one."""
    conditions = [a for a in script.ancestors(node) if isinstance(a, ast.If) and word in ast.unparse(a.test)]
    return conditions[-1] if conditions else node


def change_reduction(script: Script, call: ast.Call) -> None:
    """Makes a loss function return all its errors."""
    value = keyword(call, "reduction")
    if value is not None:
        script.replace(value, '"none"')
        return
    _, end = script.span(call)
    comma = "" if script.data[: end - 1].rstrip().endswith(b",") else ","
    last = max(script.span(node)[1] for node in [*call.args, *(entry.value for entry in call.keywords)])
    script.edits.append((last, last, f'{comma} reduction="none"' if comma else ', reduction="none"'))


def replace_names(script: Script, node: ast.AST, old: str, new: str) -> None:
    for found in ast.walk(node):
        if isinstance(found, ast.Name) and found.id == old:
            script.replace(found, new)


def add_import(script: Script, name: str) -> None:
    imports = [node for node in script.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    theirs = [node for node in imports if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diff")]
    if not imports:
        raise Refused("the script imports nothing")
    node = (theirs or imports)[-1]
    script.insert_after(node, f"from speed_diffusers import {name}")
    script.note(node, f"from speed_diffusers import {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Puts SpeeD into one of diffusers' training scripts.")
    parser.add_argument("script", type=Path, help="a training script of diffusers")
    parser.add_argument("--output", type=Path, help="where to write the result; without it a diff is printed")
    args = parser.parse_args()
    try:
        source = args.script.read_bytes().decode("utf-8")
        result, report = apply_speed(source)
        if args.output is not None:
            if args.output.exists():
                raise FileExistsError(f"{args.output} exists already")
            args.output.write_bytes(result.encode("utf-8"))
    except Refused as refusal:
        print(f"{args.script}: {refusal}; nothing is written", file=sys.stderr)
        return 1
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        print(f"{args.script}: {error}", file=sys.stderr)
        return 2
    if args.output is None:
        before, after = source.splitlines(keepends=True), result.splitlines(keepends=True)
        sys.stdout.writelines(difflib.unified_diff(before, after, str(args.script), str(args.script)))
    for line in report:
        print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
