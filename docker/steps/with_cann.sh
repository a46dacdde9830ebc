#!/usr/bin/env bash
# Run a command with CANN's variables set: docker/steps/with_cann.sh COMMAND...
set -euo pipefail
for file in "${ASCEND_ROOT:-}"/usr/local/Ascend/{cann,ascend-toolkit}/set_env.sh; do
  if [[ -f $file ]]; then
    set +u # CANN's scripts read variables that may be unset
    # shellcheck source=/dev/null
    source "$file"
    set -u
    break
  fi
done
exec "$@"
