"""Messages to token ids and a supervised mask through the tokenizer's own template.

Training, evaluation, generation and serving all come here, so what a model is trained on is, token for token, what it
reads and writes at use. The text is laid out first (`layout`), then encoded piece by piece (`encoding`).
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from tunesmith.core.errors import RenderError, unknown
from tunesmith.core.record import Message
from tunesmith.core.row import segment
from tunesmith.data.encoding import Piece, PieceEncoder, any_of, special_tokens
from tunesmith.data.layout import Dialogue, Signs, Structure, Turn
from tunesmith.data.rendered import Plan, Rendered, assemble
from tunesmith.data.templates import Template, find_template, merge_system, normalise
from tunesmith.data.textrow import TextRow

__all__ = [
    "Plan",
    "Rendered",
    "Renderer",
    "Special",
    "Supervise",
    "SystemTurn",
    "options",
    "prompt",
    "render",
    "render_turns",
    "renderer_for",
]

Supervise = Literal["all", "last", "none"]
Special = Literal["text", "refuse", "trust"]
SystemTurn = Literal["template", "user"]
Tools = Sequence[Mapping[str, Any]]


class Renderer:
    """Renders dialogues with one tokenizer and one template; what the template does is probed once.

    template: a Jinja file, Jinja text, a built-in name ("plain"), the name of one of the tokenizer's templates, or None for
    the tokenizer's own ("plain" if it has none). default_system: system text for dialogues without a system turn.
    system: "template" gives system turns to the template, "user" joins them to the first user turn (Gemma and others).
    special: what to do with special-token text in the data: encode it as plain "text", "refuse" it, or "trust" it as tokens.
    variables: more names for the template (enable_thinking=False).
    Raises RenderError where the template cannot be read.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | Path | None = None,
        default_system: str | None = None,
        system: SystemTurn = "template",
        special: Special = "text",
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        for kind, value, known in (("system", system, get_args(SystemTurn)), ("special", special, get_args(Special))):
            if value not in known:
                raise unknown(f"value of {kind}", value, known)
        self.tokenizer = tokenizer
        self._chosen, self._variables = template, dict(variables or {})
        self._default_system, self._system, self._special = default_system, system, special
        self._structures: dict[str, tuple[Structure, PieceEncoder]] = {}
        self._own_special = special_tokens(tokenizer)
        self._added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()} | self._own_special

    def template(self, tools: Tools | None = None) -> Template:
        """The template in use (a tokenizer may keep another one for dialogues with tools)."""
        return find_template(self.tokenizer, self._chosen, tools, self._variables)

    def _structure(self, tools: Tools | None) -> tuple[Structure, PieceEncoder]:
        template = self.template(tools)
        if template.source not in self._structures:
            structure = Structure(template, list(self._own_special), list(self._added))
            control = {text: self._added[text] for text in structure.control}
            self._structures[template.source] = structure, PieceEncoder(self.tokenizer, control)
        return self._structures[template.source]

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's end-of-turn token and the eos token."""
        ending = self._structure(None)[0].ending.first
        found = [self._added[ending]] if ending else []
        eos = self.tokenizer.eos_token_id
        return found if eos is None or eos in found else [*found, eos]

    def encoder(self) -> PieceEncoder:
        """The piece encoder for text outside of dialogues."""
        return PieceEncoder(self.tokenizer, self._own_special)

    def text_pieces(self, text: str) -> tuple[list[Piece], tuple[str, ...]]:
        """Text outside of dialogues as pieces, and notes: special-token text in it is treated as `special` says."""
        pattern = any_of(self._own_special)
        found = sorted(set(pattern.findall(text)))
        if self._special == "trust" or not found:
            return [Piece(text)], ()
        if self._special == "refuse":
            raise _refused(found)
        signs = Signs.absent_from(text)
        return [Piece(part, literal) for part, literal in signs.split(_mark(text, pattern, signs))], (_as_text(found),)

    def fingerprint(self) -> str:
        """Content hash of the tokenizer, the template and the options: equal fingerprints render equal ids."""
        chosen = [self.template().source, self.template([{}]).source]
        parts = [vocabulary_hash(self.tokenizer), chosen, self._variables, self._default_system, self._system, self._special]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def prompt(self, messages: Sequence[Message], *, tools: Tools | None = None) -> Rendered:
        """What the model reads before it answers: the dialogue with a generation prompt."""
        return self.render(messages, tools=tools, supervise="none", generation_prompt=True)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        supervise: Supervise = "all",
        generation_prompt: bool = False,
    ) -> Rendered:
        """The whole dialogue, with every assistant turn supervised, the last one, or none.

        Raises RenderError where the template refuses the dialogue, where a turn cannot be masked exactly, and where a
        supervised turn stands in the dialogue otherwise than it was written (use `render_turns`).
        """
        dialogue, notes = self._dialogue(messages, tools)
        chosen = _chosen(dialogue, supervise)
        count = len(dialogue.messages)
        text = dialogue.rendered(count, generation_prompt)
        if chosen and not generation_prompt and chosen[-1] == count - 1 and dialogue.turn(count - 1).add_eos:
            text = dialogue.turn(count - 1).text
        for index in chosen:
            if not dialogue.kept(index, text):
                raise dialogue.altered(index, text)
        plan = self._plan(dialogue, text, count, chosen, notes, generation_prompt)
        return self.encode([plan], tools)[0]

    def render_turns(self, messages: Sequence[Message], *, tools: Tools | None = None) -> list[Rendered]:
        """One rendering an assistant turn, each as it is when it is the last one, only that turn supervised.

        Exact under templates that alter history (Qwen3 strips the reasoning of earlier turns).
        """
        dialogue, notes = self._dialogue(messages, tools)
        return self.encode([self._turn_plan(dialogue, index, [index], notes) for index in dialogue.answers], tools)

    def plans(self, messages: Sequence[Message], *, tools: Tools | None = None, supervise: Supervise = "all") -> list[Plan]:
        """The dialogue as training rows, cut after the last supervised token (nothing after it can teach anything).

        With "all" one row if the template leaves history alone, else one row an assistant turn, which the notes say.
        """
        dialogue, notes = self._dialogue(messages, tools)
        chosen = _chosen(dialogue, supervise)
        if not chosen:
            count = len(dialogue.messages)
            return [self._plan(dialogue, dialogue.rendered(count), count, [], notes, False)]
        last = dialogue.turn(chosen[-1])
        if all(dialogue.kept(index, last.text) for index in chosen):
            return [self._turn_plan(dialogue, last.index, chosen, notes)]
        notes = [*notes, "the template alters earlier turns as a dialogue goes on: each assistant turn is a row of its own"]
        return [self._turn_plan(dialogue, index, [index], notes) for index in chosen]

    def _turn_plan(self, dialogue: Dialogue, index: int, chosen: Sequence[int], notes: Sequence[str]) -> Plan:
        return self._plan(dialogue, dialogue.turn(index).text, index + 1, chosen, notes, False)

    def _plan(
        self, dialogue: Dialogue, text: str, count: int, chosen: Sequence[int], notes: Sequence[str], generation_prompt: bool
    ) -> Plan:
        turns = dialogue.history(text, count)
        pieces = dialogue.pieces(text, turns)
        found: list[Turn] = [dialogue.turn(index) for index in chosen]
        if found and found[-1].add_eos and len(found[-1].text) == len(text):
            pieces.append(Piece(self._eos(dialogue), turn=found[-1].index, supervised=True))
        contents = dialogue.contents(dialogue.signs.strip(text), count, generation_prompt)
        roles = [str(message["role"]) for message in dialogue.messages]
        spans = [span for number, span in contents if number not in chosen and roles[number] != "system"]
        spans += [span for number, span in contents if roles[number] == "system"]
        said = dict.fromkeys([*notes, *(note for turn in found for note in turn.notes)])
        return Plan(pieces, frozenset(chosen), turns[-1] if turns else -1, spans, tuple(said))

    def _eos(self, dialogue: Dialogue) -> str:
        if not self.tokenizer.eos_token:
            name = dialogue.structure.template.name
            raise RenderError(
                f"the {name} ends an answer with no token and the tokenizer has no eos token: the model could never learn to stop.",
                hints=["Use a template that ends each answer:  base.template=FILE", "Or set the tokenizer's eos_token."],
            )
        return str(self.tokenizer.eos_token)

    def encode(self, plans: Sequence[Plan], tools: Tools | None = None) -> list[Rendered]:
        """Token ids for many plans in one call of the tokenizer."""
        encoder = self._structure(tools)[1]
        return [assemble(plan, encoded) for plan, encoded in zip(plans, encoder.encode([plan.pieces for plan in plans]), strict=True)]

    def options(self, messages: Sequence[Message], answers: Sequence[str], *, tools: Tools | None = None, where: str = "") -> TextRow:
        """A row for choosing among answers: the prompt as root, one supervised segment an answer, end-of-turn token included.

        The segments are named "prompt" and by their answers. Raises RenderError where the prompt depends on the answer.
        """
        if not answers:
            raise RenderError("there are no answers to choose from.", where=where)
        plans = []
        for answer in answers:
            dialogue, notes = self._dialogue([*messages, {"role": "assistant", "content": answer}], tools)
            plans.append(self._turn_plan(dialogue, dialogue.answers[-1], dialogue.answers[-1:], notes))
        rendered = self.encode(plans, tools)
        root = rendered[0].ids[: rendered[0].prompt_length]
        segments = [segment(root, False, name="prompt")]
        for answer, one in zip(answers, rendered, strict=True):
            if one.ids[: one.prompt_length] != root:
                raise RenderError(
                    "the prompt depends on the answer, so the answers cannot share it.", where=where, hints=[f"Answer: {answer!r}"]
                )
            segments.append(segment(one.ids[one.prompt_length :], one.supervised[one.prompt_length :], 0, answer))
        cuttable = tuple(span for span in rendered[0].cuttable if span[1] <= len(root))
        return TextRow(tuple(segments), where, cuttable=cuttable, notes=rendered[0].notes)

    def _dialogue(self, messages: Sequence[Message], tools: Tools | None) -> tuple[Dialogue, list[str]]:
        if self._default_system is not None and not any(m.get("role") == "system" for m in messages):
            messages = [{"role": "system", "content": self._default_system}, *messages]
        if self._system == "user":
            messages = merge_system(messages)
        clean = normalise(messages)
        structure = self._structure(tools)[0]
        notes = []
        if structure.template.name == "built-in template 'plain'":
            notes.append("no chat template: prompt and answer are joined directly ('plain')")
        dialogue = self._marked(structure, clean, tools, notes)
        _check_dropped(dialogue)
        return dialogue, notes

    def _marked(self, structure: Structure, messages: list[dict[str, Any]], tools: Tools | None, notes: list[str]) -> Dialogue:
        """The dialogue with special-token text in its data put between signs that no template and no data contain."""
        everything = json.dumps([messages, tools], ensure_ascii=False, default=str)
        signs = Signs.absent_from(everything)
        control, own = any_of(structure.control), any_of(structure.answer_control)
        found = sorted(set(control.findall(everything)))
        if self._special == "trust" or not found:
            return Dialogue(structure, messages, tools, signs)
        marked = [_mark(m, own if m["role"] == "assistant" else control, signs) for m in messages]
        marked_tools = [_mark(tool, control, signs) for tool in tools] if tools else None
        if marked != messages or (marked_tools or []) != list(tools or []):
            if self._special == "refuse":
                raise _refused(found)
            notes.append(_as_text(found))
        return Dialogue(structure, marked, marked_tools, signs)


def _refused(found: Sequence[str]) -> RenderError:
    return RenderError(
        f"the data contains the text of special tokens: {', '.join(found)}.", hints=["Encode it as plain text:  base.special=text"]
    )


def _as_text(found: Sequence[str]) -> str:
    return f"special-token text in the data is encoded as plain text: {', '.join(found)}"


def _chosen(dialogue: Dialogue, supervise: Supervise) -> list[int]:
    if supervise not in get_args(Supervise):
        raise unknown("value of supervise", supervise, get_args(Supervise))
    if supervise == "none":
        return []
    return dialogue.answers if supervise == "all" else dialogue.answers[-1:]


def _mark(value: Any, pattern: Any, signs: Signs) -> Any:
    if isinstance(value, str):
        return pattern.sub(f"{signs.opening}\\g<0>{signs.closing}", value)
    if isinstance(value, Mapping):
        return {key: item if key == "role" else _mark(item, pattern, signs) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mark(item, pattern, signs) for item in value]
    return value


def _check_dropped(dialogue: Dialogue) -> None:
    """A template that silently leaves out a question, a system turn, a tool's result or the tools is an error."""
    text = dialogue.rendered(len(dialogue.messages))
    name = dialogue.structure.template.name
    for number, message in enumerate(dialogue.messages):
        content = str(message.get("content", "")).strip()
        if message["role"] != "assistant" and content and content not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text:
            hints = [f"The text left out: {content[:80]!r}", "Use a template that writes it:  base.template=FILE"]
            if message["role"] == "system":
                hints.append("Or join it to the first user turn:  base.system_turn=user")
            raise RenderError(f"the {name} leaves out message {number + 1} ({message['role']}).", hints=hints)
    for tool in dialogue.tools or ():
        called = str(tool.get("function", tool).get("name"))
        if called not in text:
            raise RenderError(
                f"the {name} does not write tools ('{called}' is missing).", hints=["Use a template that knows tools:  base.template=FILE"]
            )


def vocabulary_hash(tokenizer: Any) -> str:
    """Content hash of what a tokenizer does: vocabulary, merges, normalisation, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        state = json.loads(backend.to_str())
        state.pop("padding", None)  # the state of the last call, not of the tokenizer
        state.pop("truncation", None)
    else:
        state = tokenizer.get_vocab()
    named = [type(tokenizer).__name__, tokenizer.special_tokens_map, state]
    return hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()


_KEPT = 8
_RENDERERS: OrderedDict[tuple[int, str], Renderer] = OrderedDict()


def renderer_for(
    tokenizer: Any,
    template: str | Path | None = None,
    *,
    system: SystemTurn = "template",
    special: Special = "text",
    variables: Mapping[str, Any] | None = None,
) -> Renderer:
    """The renderer for a tokenizer, a template and options; the last few are kept, for as long as the tokenizer stays as it is."""
    path = Path(template) if isinstance(template, Path) or (isinstance(template, str) and "{" not in template) else None
    changed = path.stat().st_mtime_ns if path and path.is_file() else 0
    options = [system, special, json.dumps(variables or {}, sort_keys=True, default=repr)]
    state = repr([str(template), changed, options, str(tokenizer.chat_template), len(tokenizer), tokenizer.special_tokens_map])
    key = (id(tokenizer), state)  # the renderer holds the tokenizer, so its id is not given away while the entry lives
    if key not in _RENDERERS:
        _RENDERERS[key] = Renderer(tokenizer, template=template, system=system, special=special, variables=variables)
    _RENDERERS.move_to_end(key)
    while len(_RENDERERS) > _KEPT:
        _RENDERERS.popitem(last=False)
    return _RENDERERS[key]


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    supervise: Supervise = "all",
    generation_prompt: bool = False,
    template: str | Path | None = None,
) -> Rendered:
    """`Renderer.render` with a kept renderer."""
    return renderer_for(tokenizer, template).render(messages, tools=tools, supervise=supervise, generation_prompt=generation_prompt)


def render_turns(
    tokenizer: Any, messages: Sequence[Message], *, tools: Tools | None = None, template: str | Path | None = None
) -> list[Rendered]:
    """`Renderer.render_turns` with a kept renderer."""
    return renderer_for(tokenizer, template).render_turns(messages, tools=tools)


def prompt(tokenizer: Any, messages: Sequence[Message], *, tools: Tools | None = None, template: str | Path | None = None) -> Rendered:
    """`Renderer.prompt` with a kept renderer."""
    return renderer_for(tokenizer, template).prompt(messages, tools=tools)


def options(
    tokenizer: Any,
    messages: Sequence[Message],
    answers: Sequence[str],
    *,
    tools: Tools | None = None,
    template: str | Path | None = None,
    where: str = "",
) -> TextRow:
    """`Renderer.options` with a kept renderer."""
    return renderer_for(tokenizer, template).options(messages, answers, tools=tools, where=where)
