#!/usr/bin/python
"""Ansible module: one application's database, with its roles and what each of them may do."""

from __future__ import annotations

import os
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.postgresql_host import (
    PostgresqlError,
    find_cluster,
    identifier,
    literal,
    psql,
    query,
    scram_verifier,
    verifies,
)

DOCUMENTATION = r"""
---
module: postgresql_database
short_description: Keep one application's database, its roles and their rights
description:
  - Three roles. The owner owns the database, the schema C(public) and all that is in it, and migrates. The group may
    read and write rows, in what is there and in what the owner makes later, and cannot log in. The login is a member of
    the group, and is what the application uses.
  - Works as C(postgres) over the local socket, with SQL on standard input. Passwords are compared with the verifiers
    that PostgreSQL stores, and only verifiers are sent, so no password can reach a log.
  - Looks first, does what is missing, and looks again; a task that did not take is an error.
  - Objects that the owner does not own, such as those of a dump that was loaded by C(postgres), become the owner's.
options:
  database: {description: The database., type: str, required: true}
  locale: {description: Locale of the database when it is made., type: str, required: true}
  owner: {description: Role that owns it., type: str, required: true}
  owner_password: {description: Its password. Printable ASCII., type: str, required: true}
  owner_settings: {description: "Settings of PostgreSQL that hold in its sessions, as text.", type: dict, default: {}}
  owner_groups: {description: Roles that it is a member of., type: list, elements: str, default: []}
  group: {description: Role that has the application's rights., type: str, required: true}
  login: {description: Role that the application logs in as., type: str, required: true}
  login_password: {description: Its password. Printable ASCII., type: str, required: true}
  login_settings:
    description: Settings of PostgreSQL that hold in the login's sessions, as text.
    type: dict
    default: {}
author: Hardstand
attributes:
  check_mode:
    support: full
    description: On a server without PostgreSQL, or without the database, says what a first run does there.
  diff_mode:
    support: full
    description: Lists what is done, in words.
"""

EXAMPLES = r"""
- name: Make database and roles
  postgresql_database:
    database: blog
    locale: C.UTF-8
    owner: blog_owner
    owner_password: "{{ vault_owner_password }}"
    group: blog
    login: blog_1a2b3c
    login_password: "{{ vault_password }}"
"""

RETURN = r"""
steps:
  description: What was done, in words.
  type: list
  elements: str
  returned: success
"""

# Kinds of relations (pg_class.relkind) and what the application may do with them. Not TRUNCATE, REFERENCES and TRIGGER.
TABLE_RIGHTS: tuple[str, ...] = ("SELECT", "INSERT", "UPDATE", "DELETE")
SEQUENCE_RIGHTS: tuple[str, ...] = ("USAGE", "SELECT")
# A busy table makes a change of its owner wait, and everybody else behind it; so it waits for a few seconds only.
LOCK_TIMEOUT = "5s"

ROLES = """
SELECT coalesce(json_object_agg(rolname, json_build_object(
  'login', rolcanlogin, 'inherit', rolinherit, 'password', coalesce(rolpassword, ''),
  'excess', rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls,
  'valid_until', rolvaliduntil::text,
  'settings', coalesce((SELECT setconfig FROM pg_db_role_setting WHERE setrole = r.oid AND setdatabase = 0), '{{}}'),
  'member_of', ARRAY(SELECT g.rolname FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid)
)), '{{}}') FROM pg_authid r WHERE rolname IN ({names})
"""
DATABASES = """
SELECT coalesce(json_object_agg(datname, json_build_object(
  'owner', pg_get_userbyid(datdba), 'encoding', pg_encoding_to_char(encoding),
  'public_connect', has_database_privilege('public', oid, 'CONNECT'),
  'public_temporary', has_database_privilege('public', oid, 'TEMPORARY'),
  'group_connect', EXISTS (SELECT FROM aclexplode(datacl) a JOIN pg_roles r ON r.oid = a.grantee
    WHERE r.rolname = {group} AND a.privilege_type = 'CONNECT'))), '{{}}')
FROM pg_database WHERE datname IN ({names})
"""
# Of the extensions' own objects nothing is ours to change.
OURS = """n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema' AND NOT EXISTS
  (SELECT FROM pg_depend d WHERE d.classid = {catalog}::regclass AND d.objid = o.oid AND d.deptype = 'e')"""
SCHEMAS = """
SELECT coalesce(json_agg(json_build_object(
  'name', nspname, 'owner', pg_get_userbyid(nspowner),
  'public_create', has_schema_privilege('public', oid, 'CREATE'),
  'public_usage', has_schema_privilege('public', oid, 'USAGE'),
  'group_usage', EXISTS (SELECT FROM aclexplode(nspacl) a JOIN pg_roles r ON r.oid = a.grantee
    WHERE r.rolname = {group} AND a.privilege_type = 'USAGE'),
  'group_create', EXISTS (SELECT FROM aclexplode(nspacl) a JOIN pg_roles r ON r.oid = a.grantee
    WHERE r.rolname = {group} AND a.privilege_type = 'CREATE')) ORDER BY nspname), '[]')
FROM pg_namespace o WHERE o.nspname NOT LIKE 'pg\\_%' AND o.nspname <> 'information_schema' AND NOT EXISTS
  (SELECT FROM pg_depend d WHERE d.classid = 'pg_namespace'::regclass AND d.objid = o.oid AND d.deptype = 'e')
"""
# Sequences that belong to a column follow their table's owner.
RELATIONS = """
SELECT coalesce(json_agg(json_build_object(
  'name', format('%I.%I', n.nspname, o.relname), 'kind', o.relkind, 'owner', pg_get_userbyid(o.relowner),
  'of_column', EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = o.oid
    AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')),
  'rights', ARRAY(SELECT a.privilege_type FROM aclexplode(o.relacl) a JOIN pg_roles r ON r.oid = a.grantee
    WHERE r.rolname = {group})) ORDER BY n.nspname, o.relname), '[]')
FROM pg_class o JOIN pg_namespace n ON n.oid = o.relnamespace
WHERE o.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND {ours}
"""
OTHERS = """
SELECT coalesce(json_agg(json_build_object('kind', kind, 'name', name) ORDER BY kind, name), '[]') FROM (
  SELECT CASE o.prokind WHEN 'p' THEN 'PROCEDURE' WHEN 'a' THEN 'AGGREGATE' ELSE 'FUNCTION' END AS kind,
    o.oid::regprocedure::text AS name
  FROM pg_proc o JOIN pg_namespace n ON n.oid = o.pronamespace WHERE pg_get_userbyid(o.proowner) <> {owner} AND {proc}
  UNION ALL
  SELECT CASE o.typtype WHEN 'd' THEN 'DOMAIN' ELSE 'TYPE' END, format('%I.%I', n.nspname, o.typname)
  FROM pg_type o JOIN pg_namespace n ON n.oid = o.typnamespace LEFT JOIN pg_class c ON c.oid = o.typrelid
  WHERE pg_get_userbyid(o.typowner) <> {owner} AND o.typelem = 0 AND o.typtype IN ('d', 'e', 'c', 'r')
    AND (c.relkind IS NULL OR c.relkind = 'c') AND {type}) found
"""
DEFAULTS = """
SELECT coalesce(json_object_agg(kind, rights), '{{}}') FROM (
  SELECT defaclobjtype AS kind, array_agg(a.privilege_type ORDER BY a.privilege_type) AS rights
  FROM pg_default_acl, aclexplode(defaclacl) a
  WHERE defaclrole = (SELECT oid FROM pg_roles WHERE rolname = {owner}) AND defaclnamespace = 0
    AND a.grantee = (SELECT oid FROM pg_roles WHERE rolname = {group})
  GROUP BY defaclobjtype) found
"""
RELATION_KINDS = {
    "r": "TABLE",
    "p": "TABLE",
    "v": "VIEW",
    "m": "MATERIALIZED VIEW",
    "f": "FOREIGN TABLE",
    "S": "SEQUENCE",
}
DEFAULT_KINDS = {"r": ("TABLES", TABLE_RIGHTS), "S": ("SEQUENCES", SEQUENCE_RIGHTS), "n": ("SCHEMAS", ("USAGE",))}


class Step(t.NamedTuple):
    """Something to do: in words, without secrets, and as SQL for one of the databases."""

    words: str
    sql: str
    database: str = "postgres"


def role_steps(
    name: str,
    found: t.Mapping[str, t.Any] | None,
    password: str | None = None,
    settings: t.Mapping[str, str] | None = None,
    groups: t.Sequence[str] = (),
) -> list[Step]:
    """Return what makes a role as it should be.

    Args:
        name: the role.
        found: what there is of it; None when there is nothing.
        password: it logs in with; None for a role that cannot.
        settings: of its sessions.
        groups: roles that it is a member of.
    """
    role, steps = identifier(name), []
    if found is None:
        kind = "LOGIN" if password is not None else "NOLOGIN"
        steps.append(Step(f"make role {name}", f"CREATE ROLE {role} {kind};"))
        found = {"login": password is not None, "inherit": True, "excess": False, "password": "", "settings": []}
    if found["excess"]:
        sql = f"ALTER ROLE {role} NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS;"
        steps.append(Step(f"take more than ordinary rights from role {name}", sql))
    if not found["inherit"]:
        steps.append(Step(f"let role {name} use the rights of its group", f"ALTER ROLE {role} INHERIT;"))
    if password is not None:
        if not found["login"] or found.get("valid_until") not in (None, "infinity"):
            steps.append(Step(f"let role {name} log in", f"ALTER ROLE {role} LOGIN VALID UNTIL 'infinity';"))
        if not verifies(password, found["password"]):
            verifier = literal(scram_verifier(password))
            steps.append(Step(f"set the password of role {name}", f"ALTER ROLE {role} PASSWORD {verifier};"))
    now = dict(each.split("=", 1) for each in found["settings"])
    for setting, value in (settings or {}).items():
        if now.get(setting) != value:
            sql = f"ALTER ROLE {role} SET {setting} = {literal(value)};"
            steps.append(Step(f"set {setting} = {value} for role {name}", sql))
    for group in groups:
        if group not in found.get("member_of", []):
            steps.append(Step(f"make role {name} a member of {group}", f"GRANT {identifier(group)} TO {role};"))
    return steps


def database_steps(p: t.Mapping[str, t.Any], databases: t.Mapping[str, t.Mapping[str, t.Any]]) -> list[Step]:
    """Return what makes the database the owner's, and keeps everybody else out of it and of PostgreSQL's own."""
    name, owner, group = p["database"], identifier(p["owner"]), identifier(p["group"])
    database, steps = identifier(name), []
    found = databases.get(name)
    if found is None:
        locale = literal(p["locale"])
        sql = f"CREATE DATABASE {database} OWNER {owner} TEMPLATE template0 ENCODING 'UTF8' LOCALE {locale};"
        steps.append(Step(f"make database {name}", sql))
        found = {"owner": p["owner"], "public_connect": True, "public_temporary": True, "group_connect": False}
    if found["owner"] != p["owner"]:
        steps.append(Step(f"give database {name} to {p['owner']}", f"ALTER DATABASE {database} OWNER TO {owner};"))
    if not found["group_connect"]:
        steps.append(
            Step(f"let {p['group']} connect to database {name}", f"GRANT CONNECT ON DATABASE {database} TO {group};")
        )
    new = {"public_connect": True, "public_temporary": True}
    for each, state in {"postgres": new, "template1": new, **databases, name: found}.items():
        if state["public_connect"] or state["public_temporary"]:
            sql = f"REVOKE CONNECT, TEMPORARY ON DATABASE {identifier(each)} FROM PUBLIC;"
            steps.append(Step(f"close database {each} to others", sql))
    return steps


def content_steps(p: t.Mapping[str, t.Any], content: t.Mapping[str, t.Any]) -> list[Step]:
    """Return what gives the database's content to the owner, and its rows to the group."""
    owner, group, steps = identifier(p["owner"]), identifier(p["group"]), []

    def step(words: str, sql: str) -> None:
        steps.append(Step(words, sql, p["database"]))

    for schema in content["schemas"]:
        name = identifier(schema["name"])
        if schema["owner"] != p["owner"]:
            step(f"give schema {schema['name']} to {p['owner']}", f"ALTER SCHEMA {name} OWNER TO {owner};")
        if schema["public_create"] or schema["public_usage"]:
            step(f"close schema {schema['name']} to others", f"REVOKE ALL ON SCHEMA {name} FROM PUBLIC;")
        if schema["group_create"]:
            step(
                f"let {p['group']} make nothing in schema {schema['name']}",
                f"REVOKE CREATE ON SCHEMA {name} FROM {group};",
            )
        if not schema["group_usage"]:
            step(f"let {p['group']} use schema {schema['name']}", f"GRANT USAGE ON SCHEMA {name} TO {group};")
    for relation in content["relations"]:
        kind = RELATION_KINDS[relation["kind"]]
        words = f"{kind.lower()} {relation['name']}"
        if relation["owner"] != p["owner"] and not (kind == "SEQUENCE" and relation["of_column"]):
            step(f"give {words} to {p['owner']}", f"ALTER {kind} {relation['name']} OWNER TO {owner};")
        rights = SEQUENCE_RIGHTS if kind == "SEQUENCE" else TABLE_RIGHTS
        # What its owner has, the next owner gets.
        granted = set() if relation["owner"] == p["group"] else set(relation["rights"])
        # GRANT has one word for all that is like a table.
        on = "SEQUENCE" if kind == "SEQUENCE" else "TABLE"
        if not set(rights) <= granted:
            sql = f"GRANT {', '.join(rights)} ON {on} {relation['name']} TO {group};"
            step(f"let {p['group']} work with {words}", sql)
        if excess := sorted(granted - set(rights)):
            sql = f"REVOKE {', '.join(excess)} ON {on} {relation['name']} FROM {group};"
            step(f"take {', '.join(excess)} on {words} from {p['group']}", sql)
    for other in content["others"]:
        words = f"{other['kind'].lower()} {other['name']}"
        step(f"give {words} to {p['owner']}", f"ALTER {other['kind']} {other['name']} OWNER TO {owner};")
    for kind, (plural, rights) in DEFAULT_KINDS.items():
        if not set(rights) <= set(content["defaults"].get(kind, [])):
            sql = f"ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT {', '.join(rights)} ON {plural} TO {group};"
            step(f"let {p['group']} work with {plural.lower()} that {p['owner']} makes", sql)
    return steps


NOTHING: dict[str, t.Any] = {
    "schemas": [
        {
            "name": "public",
            "owner": "pg_database_owner",
            "public_create": False,
            "public_usage": True,
            "group_usage": False,
            "group_create": False,
        }
    ],
    "relations": [],
    "others": [],
    "defaults": {},
}


def plan(p: t.Mapping[str, t.Any], state: t.Mapping[str, t.Any]) -> list[Step]:
    """Return what there is to do, in order; nothing when all is as it should be."""
    roles = state["roles"]
    return [
        *role_steps(p["owner"], roles.get(p["owner"]), p["owner_password"], p["owner_settings"], p["owner_groups"]),
        *role_steps(p["group"], roles.get(p["group"])),
        *role_steps(p["login"], roles.get(p["login"]), p["login_password"], p["login_settings"], [p["group"]]),
        *database_steps(p, state["databases"]),
        *content_steps(p, state["content"]),
    ]


def look(p: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Return what there is."""
    owner, group = literal(p["owner"]), literal(p["group"])
    roles = query(ROLES.format(names=", ".join(literal(p[name]) for name in ("owner", "group", "login"))))
    names = ", ".join(map(literal, (p["database"], "postgres", "template1")))
    databases = query(DATABASES.format(names=names, group=group))
    if p["database"] not in databases:
        return {"roles": roles, "databases": databases, "content": NOTHING}
    asked = {
        "schemas": SCHEMAS.format(group=group),
        "relations": RELATIONS.format(group=group, ours=OURS.format(catalog="'pg_class'")),
        "others": OTHERS.format(
            owner=owner, proc=OURS.format(catalog="'pg_proc'"), type=OURS.format(catalog="'pg_type'")
        ),
        "defaults": DEFAULTS.format(owner=owner, group=group),
    }
    answers = ", ".join(f"'{name}', ({sql})" for name, sql in asked.items())
    content = query(f"SELECT json_build_object({answers})", p["database"])
    return {"roles": roles, "databases": databases, "content": content}


def carry_out(steps: list[Step]) -> None:
    """Take the steps: what can be in one transaction, in one.

    Raises PostgresqlError at the first that PostgreSQL refuses.
    """
    while steps:
        database = steps[0].database
        alone = steps[0].sql.startswith("CREATE DATABASE")
        batch = [steps[0]]
        while not alone and len(batch) < len(steps):
            following = steps[len(batch)]
            if following.database != database or following.sql.startswith("CREATE DATABASE"):
                break
            batch.append(following)
        sql = "\n".join(step.sql for step in batch)
        psql(sql if alone else f"SET lock_timeout = '{LOCK_TIMEOUT}';\nBEGIN;\n{sql}\nCOMMIT;", database)
        steps = steps[len(batch) :]


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "database": {"type": "str", "required": True},
            "locale": {"type": "str", "required": True},
            "owner": {"type": "str", "required": True},
            "owner_password": {"type": "str", "required": True, "no_log": True},
            "owner_settings": {"type": "dict", "default": {}},
            "owner_groups": {"type": "list", "elements": "str", "default": []},
            "group": {"type": "str", "required": True},
            "login": {"type": "str", "required": True},
            "login_password": {"type": "str", "required": True, "no_log": True},
            "login_settings": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    p = dict(module.params)
    for settings in ("owner_settings", "login_settings"):
        p[settings] = {name: str(value) for name, value in p[settings].items()}
    try:
        cluster = find_cluster()
        if module.check_mode and not (cluster and cluster.running):
            state: dict[str, t.Any] = {"roles": {}, "databases": {}, "content": NOTHING}
        else:
            state = look(p)
        encoding = state["databases"].get(p["database"], {}).get("encoding", "UTF8")
        if encoding != "UTF8":
            module.fail_json(msg=f"Database {p['database']} has the encoding {encoding}; it must be UTF8.")
        steps = left = plan(p, state)
        # A second look says whether it took. It may also show more: what changes its owner changes its rights as well.
        for _ in range(3):
            if not left or module.check_mode:
                break
            carry_out(left)
            left = plan(p, look(p))
            steps = steps + left
        else:
            module.fail_json(msg="PostgreSQL took this and it had no effect: " + "; ".join(step.words for step in left))
    except (PostgresqlError, ValueError) as error:
        module.fail_json(msg=str(error))
    words = [step.words for step in steps]
    result: dict[str, t.Any] = {"changed": bool(steps), "steps": words}
    if module._diff and words:
        result["diff"] = {"prepared": "".join(f"+ {each}\n" for each in words)}
    module.exit_json(**result)


if __name__ == "__main__":
    main()
