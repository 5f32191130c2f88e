#!/usr/bin/env bash
# Stands in for ansible-playbook in tests/test_git_push.py: says what the workflow gave it, and under which process.
echo "pid $$"
printf 'argument %s\n' "$@"
ssh-add -l | sed 's/^/key /'
echo "who $HARDSTAND_DEPLOY_WHO"
echo "password $(stat -c %a "$HARDSTAND_VAULT_PASSWORD_FILE") $(cat "$HARDSTAND_VAULT_PASSWORD_FILE")"
env | grep -q 'PRIVATE KEY' && echo "the key is in the environment"
trap 'echo interrupted; exit 99' INT
if [[ -n ${WAIT:-} ]]; then
    touch "$WAIT"
    while true; do sleep 0.1; done
fi
exit "${CODE:-0}"
