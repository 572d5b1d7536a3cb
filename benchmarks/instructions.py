"""Read machine instructions from listings of NVIDIA's `nvdisasm -c` and of AMD's assembly."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The pipe that executes an NVIDIA opcode. Opcodes in none of these sets issue and use none of these pipes.
_FMA = {
    *("FADD", "FADD2", "FFMA", "FFMA2", "FHADD", "FHFMA", "FMUL", "FMUL2", "FSWZADD"),
    *("HADD2", "HFMA2", "HMUL2", "IMAD", "IDP"),
}
_SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"}
_ALU = {
    *("BMSK", "F2FP", "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "HMNMX2", "HSET2", "HSETP2", "I2FP", "IABS"),
    *("IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF"),
    *("VABSDIFF", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3"),
}
# Matrix products on any generation of NVIDIA and AMD.
_TENSOR = re.compile(r"(UTC)?[A-Z]G?MMA|v_s?mfma_\w+")
# AMD executes these on its one vector pipe at a quarter of the rate.
_AMD_SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")

_SASS = re.compile(
    r"^\s*(?:(?P<label>\.L\w+):|/\*(?P<at>[0-9a-f]+)\*/\s+(?P<guard>@!?U?P\w+)?\s*(?P<op>[A-Z]\S*)(?P<args>.*?)\s*;)"
)
_AMDGCN = re.compile(r"^(?:(?P<label>\.L\w+):|\t(?P<op>[a-z]\w+)(?P<args>[^;]*))")
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?([us]?byte|[us]?short|dword)(?:x(\d))?")
_AMD_BYTES = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        opcode: the mnemonic with its modifiers.
        guarded: whether a predicate decides if it runs.
        access: ("load" or "store", bytes per lane) if it accesses global memory.
        pipe: "fma", "alu", "special", "tensor" or "other".
        registers: the registers that it names.
        late: the registers that it fills with a delay, because memory or another lane answers.
        queue: the queue that counts its completion, if code waits for a number of completions. On NVIDIA an
            asynchronous copy joins the group "open", which "groups" closes; on AMD they are "vmcnt" and "lgkmcnt".
        waits: the queues that it waits for, and how many entries of each may stay outstanding.
    """

    opcode: str
    guarded: bool = False
    access: tuple[str, int] | None = None
    pipe: str = "other"
    registers: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    queue: str = ""
    waits: tuple[tuple[str, int], ...] = ()

    @property
    def barrier(self) -> bool:
        """Whether every warp of the program waits for the others here."""
        return self.opcode.startswith(("BAR.SYNC", "BAR.RED", "s_barrier"))

    @property
    def shuffle(self) -> bool:
        """Whether lanes of a warp exchange values here."""
        across = ("SHFL", "REDUX", "CREDUX", "ds_bpermute", "ds_permute", "ds_swizzle", "v_permlane")
        return self.opcode.startswith(across) or self.opcode.endswith("_dpp")

    @property
    def bulk_copy(self) -> bool:
        """Whether NVIDIA's tensor memory accelerator copies to shared memory here."""
        return self.opcode.startswith(("UTMALDG", "UBLKCP"))


# A line is a label, or an instruction with the label it may branch to.
Line = str | tuple[Instruction, str | None]


def nvidia(listing: str) -> list[Line]:
    """Return the lines of a listing of `nvdisasm -c`."""
    lines: list[Line] = []
    for match in filter(None, map(_SASS.match, listing.splitlines())):
        if match["label"]:
            lines.append(match["label"])
            continue
        op, args = match["op"], match["args"]
        name, *modifiers = op.split(".")
        if name == "NOP":  # pads the end of the program
            continue
        pipe = next((p for p, ops in (("fma", _FMA), ("alu", _ALU), ("special", _SPECIAL)) if name in ops), "other")
        if _TENSOR.fullmatch(name):
            pipe = "tensor"
        width = next((m for m in modifiers if re.fullmatch(r"[US]?(8|16|64|128|256)", m)), "32")
        size = int(width.lstrip("US")) // 8
        access = ("store" if name == "STG" else "load", size) if name in ("LDG", "STG", "LDGSTS") else None
        branch = re.search(r"`\((\.L\w+)\)", args) if name == "BRA" else None
        guarded = match["guard"] is not None or (name == "BRA" and not args.strip().startswith("`"))
        registers = tuple(re.findall(r"\bU?R\d+\b", args))
        late: tuple[str, ...] = ()
        if name in ("LDG", "LDS", "SHFL", "REDUX", "CREDUX") and registers:
            kind, first = registers[0].split("R")
            late = tuple(f"{kind}R{int(first) + i}" for i in range(max(1, size // 4)))
        queue = {"LDGSTS": "open", "LDGDEPBAR": "groups"}.get(name, "")
        # Scoreboard 0 counts the groups of asynchronous copies, if there are any.
        wait = re.match(r"\s*SB0, (0x[0-9a-f]+)", args) if op == "DEPBAR.LE" else None
        waits = (("groups", int(wait[1], 16)),) if wait else ()
        instruction = Instruction(op, guarded, access, pipe, registers, late, queue, waits)
        lines.append((instruction, branch[1] if branch else None))
    return lines


def amd(listing: str) -> list[Line]:
    """Return the lines of AMD's assembly, in which code waits for registers through counters only."""
    lines: list[Line] = []
    for match in filter(None, map(_AMDGCN.match, listing.partition(".section\t.rodata")[0].splitlines())):
        if match["label"]:
            lines.append(match["label"])
            continue
        name, args = match["op"], match["args"]
        pipe = "special" if _AMD_SPECIAL.match(name) else "alu" if name.startswith("v_") else "other"
        if _TENSOR.fullmatch(name):
            pipe = "tensor"
        access = None
        if found := _AMD_ACCESS.match(name):
            access = (found[1], _AMD_BYTES[found[2]] * int(found[3] or 1))
        queue = "vmcnt" if access else "lgkmcnt" if name.startswith(("ds_", "s_load")) else ""
        counts = re.findall(r"(vmcnt|lgkmcnt)\((\d+)\)", args) if name == "s_waitcnt" else []
        waits = tuple((counter, int(count)) for counter, count in counts)
        branch = args.strip() if "branch" in name else None
        lines.append((Instruction(name, access=access, pipe=pipe, queue=queue, waits=waits), branch))
    return lines
