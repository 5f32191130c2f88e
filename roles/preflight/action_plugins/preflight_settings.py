"""Action plugin: check every setting on the control node, before any server is touched.

It answers what Ansible does not: which file and line to edit, which name was meant, and all problems at once.

Arguments:
    roles_directory: directory of the roles whose ``meta/argument_specs.yml`` say which settings exist.
    roles_apart: roles that have their own playbook, so that their required settings are not asked for here.
    renamed: old name of a setting to its new one.

Returns ``sources``: where each host of the play is defined, as ``file:line``, and ``settings_file``: where an operator
adds a setting; for messages of later tasks.
Runs once for the play, sees the variables of all its hosts, and opens no connection.
"""

from __future__ import annotations

import difflib
import os
import re
import typing as t
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import yaml
from ansible.errors import AnsibleError, AnsibleUndefinedVariable
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.utils.vars import load_extra_vars

# libyaml's loader is ten times faster, and present wherever PyYAML comes as a wheel.
YamlLoader: t.Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

COMMAND_LINE = "command line (-e)"
VAULT_HEADER = "$ANSIBLE_VAULT"

# Settings that belong to no role: what they must look like, and how to say so.
APP_NAME = re.compile(r"[a-z][a-z0-9-]{0,22}")
DNS_NAME = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
# The application gets an account of its name, which must not be one that the system or Hardstand uses.
TAKEN_ACCOUNTS = re.compile(
    "root|daemon|bin|sys|sync|games|man|lp|mail|news|uucp|proxy|www-data|backup|list|irc|nobody|sshd|messagebus"
    "|systemd-.*|nginx|postgres|supervisor|pyenv|git|admin|debian|ubuntu|.*-build|.*-migrate"
)

# Names that PostgreSQL keeps for itself.
TAKEN_DATABASES = re.compile("pg_.*|template[01]|public|none|all|replication|same(?:user|role|group)|user")
# A value that comes from the vault, or from what group_vars/all.yml makes of it, is judged there.
FROM_VAULT = re.compile(r"vault_|\bdatabase_(?:migration_)?url\b")
SHORTEST_PASSWORD = 16
DATABASE_SECRETS = ("vault_postgresql_password", "vault_postgresql_owner_password", "vault_backup_passphrase")

# Whole values that nobody means as a secret, and pieces that give a template away wherever they stand.
PLACEHOLDER = re.compile(
    r"x{3,}|\*{3,}|\.{3,}|placeholder\W*|example|todo\b.*|fixme\b.*|tbd|secret|password|dummy|<.*>|none|null",
    re.I | re.S,
)
PLACEHOLDER_PART = re.compile(r"(?:change|replace)[-_ ]?(?:me|this|it)|[:/@]<[^<>@]+>", re.I)
SECRET_NAME = re.compile(r"secret|passw|token|credential|(?:^|_)key$|^vault_", re.I)

TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "str": ("text", (str,)),
    "path": ("a path", (str,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "bool": ("true or false", (bool,)),
    "list": ("a list", (list, tuple)),
    "dict": ("a mapping of names to values", (Mapping,)),
}


class Later:
    """Stands for a value that only exists once the servers have been asked, such as a fact."""


class Place(t.NamedTuple):
    """Where something is written; line 0 means that no line can be named."""

    path: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


class Problem(t.NamedTuple):
    """One thing to put right; sorts by file and line."""

    place: Place
    text: str


class Option(t.NamedTuple):
    """A setting, as a role's argument specification declares it."""

    role: str
    spec: Mapping[str, t.Any]
    required: bool


class Definition(t.NamedTuple):
    """A place that sets a variable; a higher rank wins, as in Ansible's order of precedence."""

    rank: int
    place: Place
    target: str  # the group or host it is set for
    of_host: bool


def shown(path: str | Path) -> str:
    """Return the path as a person in the current directory would type it."""
    real = os.path.realpath(path)
    relative = os.path.relpath(real, os.path.realpath(os.curdir))
    return real if relative.startswith("..") else relative


def read_specs(directory: Path) -> dict[str, dict[str, Option]]:
    """Return the options of every role below ``directory``: role, option name, option.

    Raises:
        AnsibleError: a specification is not valid YAML.
    """
    specs: dict[str, dict[str, Option]] = {}
    for file in sorted(directory.glob("*/meta/argument_specs.yml")):
        role = file.parts[-3]
        try:
            document = yaml.load(file.read_text(encoding="utf-8"), Loader=YamlLoader) or {}  # noqa: S506 - a safe one
        except yaml.YAMLError as error:
            raise AnsibleError(f"{shown(file)} is not valid YAML: {error}") from error
        options = specs.setdefault(role, {})
        for entry_point, entry in (document.get("argument_specs") or {}).items():
            for name, spec in (entry.get("options") or {}).items():
                required = entry_point == "main" and bool(spec.get("required"))
                options.setdefault(name, Option(role, spec, required))
    return specs


def mapping_items(node: yaml.Node | None) -> Iterator[tuple[str, int, yaml.Node]]:
    """Yield key, line and value of a YAML mapping; nothing for anything else."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), key.start_mark.line + 1, value


class Inventory:
    """Where hosts and variables are written, read from the inventory's files without evaluating them.

    Ansible itself does not tell where a variable comes from. Files that cannot be read as YAML or INI (inventory
    scripts, say) leave no trace here, which costs a message its line and nothing else.
    """

    def __init__(self, sources: Iterable[str], playbook_directory: str) -> None:
        self.hosts: dict[str, Place] = {}
        self.names: dict[str, list[Definition]] = {}
        self.wired: dict[str, Place] = {}
        self.encrypted: list[Path] = []
        self.plain_vaults: list[Path] = []
        self.directories: list[Path] = []
        for source in map(Path, sources):
            files: list[Path] = []
            if source.is_dir():
                self.directories.append(source)
                files = [file for file in sorted(source.iterdir()) if file.is_file()]
            elif source.is_file():
                self.directories.append(source.parent)
                files = [source]
            for file in files:
                self._read_hosts(file)
        for directory in self.directories:
            self._read_vars(directory, ranks=(2, 4, 7), wiring=False)
        self._read_vars(Path(playbook_directory), ranks=(3, 5, 8), wiring=True)

    def defines(self, name: str, host: str, groups: Iterable[str]) -> list[Definition]:
        """Return what sets ``name`` for a host, the winner last."""
        targets = {"all", *groups}
        found = [
            definition
            for definition in self.names.get(name, [])
            if (definition.target == host if definition.of_host else definition.target in targets)
        ]
        return sorted(found, key=lambda definition: definition.rank)

    def source(self, host: str) -> Place:
        """Return where a host is defined."""
        if host in self.hosts:
            return self.hosts[host]
        return Place(shown(self.directories[0]) if self.directories else "the inventory")

    def settings_file(self) -> Place:
        """Return the file where an operator would add a setting."""
        base = (self.directories or [Path()])[0] / "group_vars"
        for file in (base / "all" / "vars.yml", base / "all.yml", base / "all" / "main.yml"):
            if file.is_file():
                return Place(shown(file))
        return Place(shown(base / "all" / "vars.yml"))

    def vault_file(self) -> Place:
        """Return the file where an operator would add a secret."""
        if self.encrypted:
            return Place(shown(self.encrypted[0]))
        return Place(shown((self.directories or [Path()])[0] / "group_vars" / "all" / "vault.yml"))

    def _compose(self, file: Path) -> yaml.Node | None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        if text.startswith(VAULT_HEADER):
            self.encrypted.append(file)
            return None
        try:
            node: yaml.Node | None = yaml.compose(text, Loader=YamlLoader)
        except yaml.YAMLError:
            return None
        if file.stem == "vault" and has_plain_value(node):
            self.plain_vaults.append(file)
        return node

    def _add(
        self, name: str, rank: int, place: Place, target: str, of_host: bool, value: yaml.Node | None = None
    ) -> None:
        """Note where a variable is set, and where its members are (``name.key``)."""
        self.names.setdefault(name, []).append(Definition(rank, place, target, of_host))
        for key, line, inner in mapping_items(value):
            self._add(f"{name}.{key}", rank, Place(place.path, line), target, of_host, inner)

    def _read_hosts(self, file: Path) -> None:
        node = self._compose(file)
        if isinstance(node, yaml.MappingNode):
            for group, _, value in mapping_items(node):
                self._read_group(shown(file), group, value)
        elif file.suffix in ("", ".ini", ".cfg"):
            self._read_ini(file)

    def _read_group(self, path: str, group: str, node: yaml.Node) -> None:
        for key, _, value in mapping_items(node):
            for name, line, inner in mapping_items(value):
                if key == "children":
                    self._read_group(path, name, inner)
                elif key == "vars":
                    self._add(name, 1, Place(path, line), group, of_host=False, value=inner)
                elif key == "hosts":
                    # Where a host stands in several groups, the place with its variables is the one to edit.
                    if name not in self.hosts or isinstance(inner, yaml.MappingNode):
                        self.hosts[name] = Place(path, line)
                    for variable, variable_line, content in mapping_items(inner):
                        self._add(variable, 6, Place(path, variable_line), name, of_host=True, value=content)

    def _read_ini(self, file: Path) -> None:
        section = "ungrouped"
        for line, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            place, words = Place(shown(file), line), text.split("#")[0].split()
            if not words or words[0].startswith(";"):
                continue
            if words[0].startswith("["):
                section = words[0].strip("[]")
            elif section.endswith(":vars"):
                self._add(words[0].split("=")[0], 1, place, section.removesuffix(":vars"), of_host=False)
            elif not section.endswith(":children"):
                self.hosts.setdefault(words[0], place)
                for word in words[1:]:
                    self._add(word.split("=")[0], 6, place, words[0], of_host=True)

    def _read_vars(self, directory: Path, ranks: tuple[int, int, int], wiring: bool) -> None:
        for kind in ("group_vars", "host_vars"):
            for entry in sorted((directory / kind).glob("*")):
                target = entry.name if entry.is_dir() else entry.stem
                rank = ranks[2] if kind == "host_vars" else ranks[0] if target == "all" else ranks[1]
                for file in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
                    if file.suffix not in ("", ".yml", ".yaml", ".json") or not file.is_file():
                        continue
                    for name, line, value in mapping_items(self._compose(file)):
                        place = Place(shown(file), line)
                        self._add(name, rank, place, target, of_host=kind == "host_vars", value=value)
                        if wiring and kind == "group_vars":
                            self.wired[name] = place


def has_plain_value(node: yaml.Node | None) -> bool:
    """Tell whether any value below the node is neither empty nor encrypted by itself (``!vault``)."""
    if isinstance(node, yaml.MappingNode):
        return any(has_plain_value(value) for _, value in node.value)
    if isinstance(node, yaml.SequenceNode):
        return any(has_plain_value(value) for value in node.value)
    return isinstance(node, yaml.ScalarNode) and node.tag != "!vault" and bool(node.value)


def is_placeholder(value: object) -> bool:
    """Tell whether a secret's value was never filled in."""
    if not isinstance(value, str):
        return value is None
    text = value.strip()
    return not text or bool(PLACEHOLDER.fullmatch(text) or PLACEHOLDER_PART.search(text))


def leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Yield every scalar below a value, with a name that says where it stands."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def described(value: object, secret: bool) -> str:
    """Say what kind of value was given, and which, unless it is a secret."""
    if value is None:
        return "empty"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    kind = "text" if isinstance(value, str) else "true or false" if isinstance(value, bool) else "a number"
    if secret:
        return kind
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = repr(text if len(text) <= 60 else f"{text[:57]}...") if isinstance(value, str) else text
    return f"{kind}: {text}"


def type_problem(name: str, value: object, spec: Mapping[str, t.Any], loose: bool, secret: bool) -> str | None:
    """Return what is wrong with a value's type, or None.

    Args:
        name: the setting, or a piece of it, for the message.
        value: the evaluated value.
        spec: its argument specification.
        loose: the value may be text that stands for a number or a truth value, because it comes from the command
            line or from a template. In a file, ``"5"`` is refused where 5 is meant: arithmetic with it fails later.
        secret: keep the value out of the message.
    """
    kind = str(spec.get("type", "str"))
    if isinstance(value, Later) or kind not in TYPES or (value is None and spec.get("default") is None):
        return None
    expected, classes = TYPES[kind]
    fits = isinstance(value, classes) and not (isinstance(value, bool) and kind in ("int", "float"))
    if kind == "str" and isinstance(value, int) and not isinstance(value, bool):
        # Harmless, except where the digits themselves count: YAML reads 0123456, a commit, as 42798.
        fits = "version" not in name
    if not fits and loose and isinstance(value, str) and kind in ("int", "float", "bool"):
        fits = not ArgumentSpecValidator({name: {"type": kind}}).validate({name: value}).error_messages
    if not fits:
        hint = "; put it in quotes" if kind in ("str", "path") and isinstance(value, (int, float)) else ""
        hint = "; drop the quotes" if kind in ("int", "float") and re.fullmatch(r"\d+", str(value)) else hint
        return f"{name} must be {expected}, not {described(value, secret)}{hint}"
    choices = spec.get("choices")
    if choices and value not in choices:
        return f"{name} must be one of {', '.join(map(str, choices))}, not {described(value, secret)}"
    if isinstance(value, (list, tuple)) and "elements" in spec:
        inner = {"type": spec["elements"], "default": ""}
        for index, element in enumerate(value):
            if problem := type_problem(f"{name}[{index}]", element, inner, loose, secret):
                return problem
    if "options" in spec and not any(isinstance(leaf, Later) for _, leaf in leaves(value, name)):
        messages = ArgumentSpecValidator({name: dict(spec)}).validate({name: value}).error_messages
        if messages:
            return f"{name} is not as it should be" + ("" if secret else f": {'; '.join(messages)}")
    return None


class Checker:
    """Checks the settings of the play's hosts and collects the problems."""

    def __init__(self, action: ActionModule, task_vars: Mapping[str, t.Any]) -> None:
        arguments = action._task.args
        self.templar, self.loader = action._templar, action._loader
        self.hostvars = task_vars["hostvars"]
        self.members: Mapping[str, list[str]] = task_vars.get("groups") or {}
        self.hosts = list(task_vars["ansible_play_hosts"])
        self.roles_directory = Path(arguments["roles_directory"])
        self.roles_apart = set(arguments.get("roles_apart") or [])
        self.renamed = dict(arguments.get("renamed") or {})
        self.specs = read_specs(self.roles_directory)
        self.options = {name: option for options in self.specs.values() for name, option in options.items()}
        self.extra_vars = load_extra_vars(self.loader)
        self.inventory = Inventory(task_vars.get("ansible_inventory_sources") or [], task_vars["playbook_dir"])
        self.problems: set[Problem] = set()
        self.missing_secrets: dict[str, str] = {}  # name to who needs it

    def check(self) -> list[Problem]:
        """Return every problem, sorted by file and line."""
        for file in self.inventory.plain_vaults:
            text = f"is not encrypted. Encrypt it: ansible-vault encrypt {shown(file)}"
            self.problems.add(Problem(Place(shown(file)), text))
        defaults = self._role_defaults()
        self._check_groups()
        for host in self.hosts:
            variables = self.hostvars.raw_get(host)
            self.host, self.groups = host, list(variables.get("group_names", []))
            self.available = {**defaults, **variables, "hostvars": self.hostvars}
            self.engine = self.templar.copy_with_new_env(available_variables=self.available)
            for name in sorted(variables):
                self._check_name(name)
            for name, option in self.options.items():
                if name in variables:
                    self._check_value(name, variables[name], option)
                elif option.required and option.role not in self.roles_apart and not self._misspelt(name, variables):
                    self._report(self.inventory.settings_file(), f"{name} is not set, and has no default")
            for name in sorted(variables):
                if name.startswith("vault_"):
                    self._check_secret(name, self._evaluate(name, variables[name]))
            if host in self.members.get("app", []):
                self._check_database(variables)
        self._report_missing_secrets()
        return sorted(self.problems)

    def _role_defaults(self) -> dict[str, t.Any]:
        """Return what all roles define, so that a setting may refer to another role's default."""
        variables: dict[str, t.Any] = {}
        for kind in ("defaults", "vars"):
            for role in self.specs:
                file = self.roles_directory / role / kind / "main.yml"
                if file.is_file():
                    variables.update(self.loader.load_from_file(str(file), trusted_as_template=True) or {})
        return variables

    def _report_missing_secrets(self) -> None:
        """Report each secret that a vault lacks, or once that there is no vault."""
        place = self.inventory.vault_file()
        if not self.inventory.encrypted and self.missing_secrets and not Path(place.path).exists():
            environment = self.inventory.directories[0].name
            self._report(
                place,
                f"does not exist, and {', '.join(sorted(self.missing_secrets))} should be in it."
                f" Make it: ansible-playbook playbooks/environment.yml -e env={environment}",
            )
            return
        for name, reason in self.missing_secrets.items():
            hint = " (a random value: openssl rand -hex 24)" if name in DATABASE_SECRETS else ""
            self._report(place, f"{name} is not set; {reason}. Add it{hint}: ansible-vault edit {place.path}")

    def _check_groups(self) -> None:
        """Report groups that have too many servers, or too few."""
        database, backup = self.members.get("db", []), self.members.get("backup", [])
        if len(database) > 1:
            text = (
                f"group db has {len(database)} servers ({', '.join(database)}), and can have one: it makes no replicas."
                " Leave one, or use a managed database and none"
            )
            self._report(self.inventory.source(database[-1]), text)
        if len(backup) > 1:
            text = f"group backup has {len(backup)} servers ({', '.join(backup)}), and can have one. Leave one"
            self._report(self.inventory.source(backup[-1]), text)
        if backup and not database:
            text = f"{backup[0]} is in group backup, and there is no server in group db whose backups it would keep"
            self._report(self.inventory.source(backup[0]), text)
        elif set(backup) & set(database):
            text = f"{backup[0]} is in groups db and backup. Leave group backup empty, and it keeps its own backups"
            self._report(self.inventory.source(backup[0]), text)

    def _quietly(self, raw: object) -> t.Any:
        """Evaluate a value whose problems are reported elsewhere."""
        try:
            return self.engine.template(raw)
        except AnsibleError:
            return Later()

    def _check_database(self, variables: Mapping[str, t.Any]) -> None:
        """Report a database that does not fit the servers, and one that the application is not told of."""
        database, apps = self.members.get("db", []), self.members.get("app", [])
        each_host = self._quietly(variables.get("release_migrate_each_host")) is True
        name, written = "release_secrets", variables.get("release_secrets")
        if not isinstance(written, Mapping) or "DATABASE_URL" not in written:
            plain = variables.get("release_env")
            if isinstance(plain, Mapping) and "DATABASE_URL" in plain:
                name, written = "release_env", plain
        raw = written.get("DATABASE_URL") if isinstance(written, Mapping) else None
        path, value = f"{name}.DATABASE_URL", self._quietly(raw)
        place = self._place(name, path) if name in variables else self.inventory.settings_file()
        if not database:
            if value == "" and re.search(r"\bdatabase_url\b", str(raw)):
                self.missing_secrets.setdefault("vault_database_url", f"{path} needs it ({place})")
            elif isinstance(value, str) and value.startswith("sqlite") and len(apps) > 1 and not each_host:
                text = (
                    f"{path} is SQLite, a file on one server, and each of {len(apps)} application servers would have"
                    " data of its own. Use PostgreSQL: a server in group db, or a managed one (vault_database_url)."
                    " Servers that are to know nothing of each other say release_migrate_each_host: true"
                )
                self._report(place, text)
            return

        if each_host:
            text = f"release_migrate_each_host must be false: all servers share the database of {database[0]}"
            self._report(self._place("release_migrate_each_host"), text)
        for setting, variable in (
            ("release_secrets", "database_url"),
            ("release_migration_secrets", "database_migration_url"),
        ):
            self._check_url(variables, setting, variable, database[0])
        if TAKEN_DATABASES.fullmatch(str(variables.get("app_name")).replace("-", "_")):
            text = (
                f"app_name {variables.get('app_name')!r} makes a name that PostgreSQL keeps for itself; choose another"
            )
            self._report(self._place("app_name"), text)
        found = {}
        for secret in DATABASE_SECRETS:
            found[secret] = value = self._quietly(variables[secret]) if secret in variables else Later()
            fits = not isinstance(value, str) or (
                len(value) >= SHORTEST_PASSWORD and value.isascii() and value.isprintable()
            )
            if not fits and not is_placeholder(value):
                text = f"{secret} must have {SHORTEST_PASSWORD} characters or more, all of them printable ASCII"
                self._report(self._place(secret), f"{text}{self._how_to(secret)}")
        application, owner = (found[secret] for secret in DATABASE_SECRETS[:2])
        if isinstance(owner, str) and owner and owner == application:
            text = "vault_postgresql_owner_password is the application's too, which then could log in as the owner"
            self._report(self._place(DATABASE_SECRETS[1]), f"{text}; choose another{self._how_to(DATABASE_SECRETS[1])}")

    def _check_url(self, variables: Mapping[str, t.Any], setting: str, variable: str, server: str) -> None:
        """Report where the application, or its migrations, are not told of the database server."""
        written = variables.get(setting)
        if written is not None and not isinstance(written, Mapping):
            return
        raw = dict(written or {})
        wanted, path = (
            self._quietly(variables.get(variable, "")),
            f"{setting}.DATABASE_URL",
        )
        given = self._quietly(raw["DATABASE_URL"]) if "DATABASE_URL" in raw else None
        # An application that has another name for it, or takes it apart.
        elsewhere = "DATABASE_URL" not in raw and re.search(rf"\b{variable}\b", str(raw))
        if isinstance(given, Later) or isinstance(wanted, Later) or elsewhere or given == wanted:
            return
        place = self._place(setting, path) if setting in variables else self.inventory.settings_file()
        line = f'DATABASE_URL: "{{{{ {variable} }}}}"'
        if setting in variables:
            text = f"{path} must be the database of {server}, which is in group db: put {line} below {setting}"
        else:
            text = (
                f"{setting} is not set, and {server} is in group db. Add these two lines:\n    {setting}:\n      {line}"
            )
        self._report(place, text)

    def _report(self, place: Place, text: str) -> None:
        self.problems.add(Problem(place, text))

    def _place(self, name: str, path: str = "") -> Place:
        """Return where the value that this host sees is set; ``path`` leads to a member of it (``name.key``)."""
        if name in self.extra_vars:
            return Place(COMMAND_LINE)
        if found := self.inventory.defines(name, self.host, self.groups):
            place = found[-1].place
            member = self.inventory.defines(path.partition("[")[0], self.host, self.groups)
            return member[-1].place if member and member[-1].place.path == place.path else place
        for file in self.inventory.encrypted:
            if name in (self.loader.load_from_file(str(file), cache="vaulted", unsafe=True) or {}):
                return Place(shown(file))
        return Place(f"{self.host} (set by a play or an inventory plugin)")

    def _role_of(self, name: str) -> str | None:
        """Return the role that a name belongs to by its prefix."""
        roles = [role for role in self.specs if name.startswith(f"{role}_")]
        return max(roles, key=len) if roles else None

    def _meant(self, name: str) -> str | None:
        """Return the setting that a wrong name most likely stands for."""
        if role := self._role_of(name):
            close = difflib.get_close_matches(name, self.specs[role], n=1, cutoff=0.8)
            close = close or difflib.get_close_matches(name, self.options, n=1, cutoff=0.8)
            return str(close[0]) if close else None
        common = [option for option in self.options if not self._role_of(option)]
        if close := difflib.get_close_matches(name, common, n=1, cutoff=0.85):
            return str(close[0])
        # A misspelt prefix: the rest must fit exactly, so that an operator's own variables stay their own.
        for role, options in self.specs.items():
            for option in options:
                rest = option.removeprefix(f"{role}_")
                if option != rest and name.endswith(f"_{rest}"):
                    prefix = name.removesuffix(f"_{rest}")
                    if difflib.SequenceMatcher(None, prefix, role).ratio() >= 0.8:
                        return option
        return None

    def _misspelt(self, name: str, variables: Iterable[str]) -> bool:
        """Tell whether a missing setting is there under a wrong name, which has been reported."""
        return any(
            self.renamed.get(other) == name or (other not in self.options and self._meant(other) == name)
            for other in variables
        )

    def _check_name(self, name: str) -> None:
        if name in self.renamed:
            self._report(self._place(name), f"{name} was renamed: call it {self.renamed[name]}")
            return
        if name in self.inventory.wired:
            for definition in self.inventory.names[name]:
                if definition.place != self.inventory.wired[name]:
                    text = f"{name} is derived in {self.inventory.wired[name]} and cannot be set here; remove it"
                    self._report(definition.place, text)
        if name in self.options or name.startswith(("_", "ansible_", "vault_")):
            return
        role, meant = self._role_of(name), self._meant(name)
        if not (role or meant):
            return
        hint = f"Did you mean {meant}?" if meant else f"See {shown(self.roles_directory / str(role) / 'README.md')}"
        places = [definition.place for definition in self.inventory.defines(name, self.host, self.groups)]
        for place in places if places and name not in self.extra_vars else [self._place(name)]:
            self._report(place, f"there is no setting {name}. {hint}")

    def _check_value(self, name: str, raw: object, option: Option) -> None:
        value = self._evaluate(name, raw)
        if isinstance(value, Later):
            return
        secret = bool(option.spec.get("no_log") or SECRET_NAME.search(name) or FROM_VAULT.search(str(raw)))
        loose = name in self.extra_vars or "{{" in str(raw)
        if problem := type_problem(name, value, option.spec, loose, secret):
            self._report(self._place(name), problem)
        elif option.required and value is None:
            self._report(self._place(name), f"{name} is empty, and has no default")
        elif problem := self._app_problem(name, value):
            self._report(self._place(name), problem)
        elif value and (option.spec.get("no_log") or SECRET_NAME.search(name)):
            self._check_secret(name, value, raw)

    def _app_problem(self, name: str, value: object) -> str | None:
        """Return what is wrong with a setting that belongs to no role, or None."""
        if name == "app_name":
            if not APP_NAME.fullmatch(str(value)):
                return (
                    f"app_name {str(value)!r} must start with a lower-case letter,"
                    " and have at most 23 lower-case letters, digits and '-'"
                )
            if TAKEN_ACCOUNTS.fullmatch(str(value)):
                return f"app_name {str(value)!r} is the name of another account on the server; choose another"
        if name == "app_domains" and isinstance(value, (list, tuple)):
            if not value:
                return "app_domains is empty; the application needs at least one DNS name"
            for domain in value:
                if not isinstance(domain, Later) and not DNS_NAME.fullmatch(str(domain)):
                    return f"app_domains: {str(domain)!r} is not a DNS name (lower case; no scheme, port or wildcard)"
        return None

    def _check_secret(self, name: str, value: object, raw: object = None) -> None:
        """Refuse values that were never filled in; never show them."""
        written = dict(leaves(raw, name))
        for path, leaf in leaves(value, name):
            # A value that is a vault's is reported there, once.
            judged_there = FROM_VAULT.search(str(written.get(path, "")))
            if not judged_there and not isinstance(leaf, Later) and is_placeholder(leaf):
                state = "empty" if leaf is None or not str(leaf).strip() else "a placeholder"
                self._report(
                    self._place(name, path), f"{path} is {state}; put the real secret there{self._how_to(name)}"
                )

    def _how_to(self, name: str) -> str:
        place = self._place(name)
        encrypted = place.path in map(shown, self.inventory.encrypted)
        return f": ansible-vault edit {place.path}" if encrypted else ""

    def _evaluate(self, name: str, raw: object, path: str = "") -> t.Any:
        """Evaluate a value piece by piece, so that every piece that cannot be evaluated is reported.

        Pieces that depend on what is known only later (facts, results of tasks) become ``Later``.
        """
        path = path or name
        if isinstance(raw, Mapping):
            return {key: self._evaluate(name, inner, f"{path}.{key}") for key, inner in raw.items()}
        if isinstance(raw, (list, tuple)):
            return [self._evaluate(name, inner, f"{path}[{index}]") for index, inner in enumerate(raw)]
        try:
            return self.engine.template(raw)
        except AnsibleUndefinedVariable as error:
            self._report_undefined(name, raw, path, str(error))
        except AnsibleError as error:
            hidden = SECRET_NAME.search(name) or FROM_VAULT.search(str(raw))
            reason = "" if hidden else f": {str(error).splitlines()[0]}"
            self._report(self._place(name, path), f"{path} cannot be evaluated{reason}")
        return Later()

    def _report_undefined(self, name: str, raw: object, path: str, message: str) -> None:
        found = re.search(r"'(\w+)' is undefined", message)
        missing = found[1] if found else ""
        if missing.startswith("vault_"):
            self.missing_secrets.setdefault(missing, f"{path} needs it ({self._place(name, path)})")
        elif missing and not missing.startswith(("_", "ansible_", "hostvars")):
            self._report(self._place(name, path), f"{path} refers to {missing}, which is not set")
        elif not missing and not re.search(r"ansible_facts|hostvars|groups|\b_\w+", str(raw)):
            self._report(
                self._place(name, path), f"{path} refers to something that is not set: {message.splitlines()[0]}"
            )


class ActionModule(ActionBase):
    """Check every setting of the play's hosts, and fail once with all problems."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return ``sources``, or a failure that lists every problem with the file to edit."""
        super().run(tmp, task_vars)
        checker = Checker(self, task_vars or {})
        problems = checker.check()
        if not problems:
            sources = {host: str(checker.inventory.source(host)) for host in checker.hosts}
            return {"changed": False, "sources": sources, "settings_file": str(checker.inventory.settings_file())}
        title = "One setting is wrong" if len(problems) == 1 else f"{len(problems)} settings are wrong"
        lines = [f"{title}. Nothing has been changed.", *(f"  {problem.place}: {problem.text}" for problem in problems)]
        return {"failed": True, "changed": False, "msg": "\n".join(lines)}
