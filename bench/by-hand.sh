#!/usr/bin/env bash
# What a careful person would write to deploy over ssh instead of using Hardstand: the same steps, one host, no checks of
# the input. bench/redeploy measures Hardstand against it.
#
#   by-hand.sh REPOSITORY "SSH COMMAND" HOST      deploys the repository's HEAD to /srv/byhand on the host
set -euo pipefail

repository=$1 ssh=$2 host=$3
commit=$(git -C "$repository" rev-parse HEAD)

GIT_SSH_COMMAND=$ssh git -C "$repository" push --quiet --force "$host:/srv/byhand/repo.git" HEAD:refs/heads/main

$ssh "$host" bash -s "$commit" <<'REMOTE'
set -euo pipefail
commit=$1 root=/srv/byhand
release=$root/releases/$commit

# Check out.
rm -rf "$release" && mkdir -p "$release"
git --git-dir=$root/repo.git --work-tree="$release" checkout --quiet --force "$commit" -- .
chown -R root:root "$release"

# The virtualenv, by its requirements.
venv=$root/venvs/$(sha256sum "$release/requirements.txt" | cut -c 1-16)
if [[ ! -e $venv/.complete ]]; then
    rm -rf "$venv"
    export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
    /opt/uv/bin/uv venv --quiet --python "$(ls -d /opt/pyenv/versions/3.*/bin/python | head -1)" "$venv"
    /opt/uv/bin/uv pip install --quiet --compile-bytecode --python "$venv/bin/python" -r "$release/requirements.txt"
    touch "$venv/.complete"
fi
ln -s "$venv" "$release/.venv"
"$venv/bin/python" -m compileall -q "$release/app"
install -m 0640 -g byhand $root/.env "$release/.env"

# Migrate.
cd "$release"
runuser -u byhand -- .venv/bin/alembic -c app/alembic.ini upgrade head

# Start the idle slot.
live=$(readlink $root/run/live.sock || true)
if [[ $live == blue.sock ]]; then slot=green old=blue; else slot=blue old=green; fi
cat >/etc/supervisor/conf.d/byhand-$slot.conf <<PROGRAM
[program:byhand-$slot]
command=$release/.venv/bin/gunicorn --bind unix:$root/run/$slot.sock --worker-class uvicorn_worker.UvicornWorker --workers 2 --timeout 60 --keep-alive 75 --no-control-socket --worker-tmp-dir /dev/shm app.asgi:app
directory=$release
user=byhand
stopwaitsecs=65
redirect_stderr=true
PROGRAM
supervisorctl reread >/dev/null
supervisorctl add byhand-$slot >/dev/null

# Wait until it is healthy, then switch.
for ((i = 0; i < 600; i++)); do
    curl --silent --fail --output /dev/null --unix-socket $root/run/$slot.sock http://localhost/health/ready && break
    sleep 0.05
done
curl --silent --fail --output /dev/null --unix-socket $root/run/$slot.sock http://localhost/health/ready
ln -s $slot.sock $root/run/live.new && mv -T $root/run/live.new $root/run/live.sock
ln -s "releases/$commit" $root/current.new && mv -T $root/current.new $root/current

# Drain and stop the old slot.
if [[ -n $live ]]; then
    while ss --no-header --unix state connected src $root/run/$old.sock | grep --quiet .; do sleep 0.05; done
    supervisorctl stop byhand-$old >/dev/null
    rm -f /etc/supervisor/conf.d/byhand-$old.conf
    supervisorctl reread >/dev/null
    supervisorctl remove byhand-$old >/dev/null
fi

# Keep five releases, note what happened.
cd $root/releases && ls -t | tail -n +6 | xargs --no-run-if-empty rm -rf
echo "$(date --iso-8601=seconds) $commit" >>$root/deploys.log
REMOTE
