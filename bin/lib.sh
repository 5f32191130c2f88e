# Shared by the scripts in bin/ and molecule/shared/. To be sourced, not run.
# shellcheck shell=bash disable=SC2034  # its variables are used by the scripts that source it

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# Everything that is slow to make and safe to throw away: images, CPython builds, source archives, virtualenvs.
cache=$HOME/.cache/hardstand
venv=$project/.venv
# One generated file in place of the user's own containers.conf, so that every run sees the same podman.
containers_conf=$cache/containers.conf
image_prefix=localhost/hardstand

# Colour only where a person looks at it.
if [[ -t 2 && -z ${NO_COLOR:-} ]]; then
    bold=$'\e[1m' red=$'\e[31m' plain=$'\e[0m'
else
    bold='' red='' plain=''
fi

# Progress goes to stderr: scripts that print an answer keep stdout for it.
say() { printf '%s==> %s%s\n' "$bold" "$*" "$plain" >&2; }
note() { printf '    %s\n' "$*" >&2; }
die() {
    printf '%serror: %s%s\n' "$red" "$1" "$plain" >&2
    shift
    local line
    for line in "$@"; do note "$line"; done
    exit 1
}

# Run a command as root: directly, through sudo, or not at all, saying what is missing.
as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "root is needed, and there is no sudo. Run as root:" "$*"
    fi
}

# Hold a lock until the script ends, so that two runs never build the same thing over each other.
# lock NAME
lock() {
    local fd
    mkdir -p "$cache/locks"
    exec {fd}>"$cache/locks/$1"
    if ! flock --nonblock "$fd"; then
        note "waiting for another run that works on $1"
        flock "$fd"
    fi
}

# Give a container that stands for a server a key to log in with as root, and print the server's own key, so that not even
# the first connection has to trust the network.
# give_access CONTAINER PRIVATE_KEY_FILE
give_access() {
    # Joined, because a shell that is asked for the output of a function does not end at a failure in it.
    { [[ -f $2 ]] || ssh-keygen -q -t ed25519 -N '' -C "$1" -f "$2"; } && podman exec "$1" sh -c '
        install -d -m 0700 /root/.ssh
        grep -qxF "$1" /root/.ssh/authorized_keys 2>/dev/null || echo "$1" >>/root/.ssh/authorized_keys
    ' sh "$(cat "$2.pub")" && podman exec "$1" cut -d ' ' -f 1,2 /etc/ssh/ssh_host_ed25519_key.pub
}

# The smaller of a hard limit of this shell ("unlimited" counts as more than enough) and a number.
# capped_limit ULIMIT_FLAG NUMBER
capped_limit() {
    local hard
    hard=$(ulimit "-H$1")
    if [[ $hard == unlimited ]] || ((hard > $2)); then
        echo "$2"
    else
        echo "$hard"
    fi
}

cgroup_v2() { [[ $(stat -fc %T /sys/fs/cgroup) == cgroup2fs ]]; }

# What ansible-core 2.19 supports on a control node.
python_range='3.11, 3.12 or 3.13'

# The first Python in that range. Asks each for the program behind it, so that a pyenv shim gives the real
# one and not a script that answers differently in another directory.
find_python() {
    local candidate candidates=(/usr/bin/python3 python3.13 python3.12 python3.11 python3)
    [[ -z ${HARDSTAND_PYTHON:-} ]] || candidates=("$HARDSTAND_PYTHON")
    for candidate in "${candidates[@]}"; do
        "$candidate" -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14); print(sys.executable)' 2>/dev/null &&
            return
    done
    return 1
}

# Make a virtualenv, or leave it alone when it is whole and made for these requirements and this Python: its stamp says
# so, and is written last. Anything else, an interrupted run among it, is made again from nothing.
# make_venv DIRECTORY DESCRIPTION REQUIREMENTS_FILE [FILE_IT_INCLUDES…]
make_venv() {
    local directory=$1 description=$2 requirements=$3 python stamp=$1/.made-for made_for
    python=$(find_python)
    made_for="$("$python" -V) $(cat "${@:3}" | sha256sum)"
    [[ ! -x $directory/bin/python || $(cat "$stamp" 2>/dev/null) != "$made_for" ]] || return 0

    lock "venv-$(sha256sum <<<"$directory" | cut -c 1-12)"
    say "Making the virtualenv for $description with $("$python" -V)"
    rm -rf "$directory"
    "$python" -m venv "$directory"
    # What the machine says about indexes, proxies and certificates (PIP_*, pip.conf) holds.
    "$directory/bin/python" -m pip install -qq --disable-pip-version-check --no-input --requirement "$requirements"
    echo "$made_for" >"$stamp"
}
