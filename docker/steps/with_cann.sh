#!/usr/bin/env bash
# Run a command with CANN's variables set: docker/steps/with_cann.sh COMMAND...
set -euo pipefail
for file in "${ASCEND_ROOT:-}"/usr/local/Ascend/{cann,ascend-toolkit}/set_env.sh; do
  if [[ -f $file ]]; then
    set +euo pipefail # CANN's scripts expect a shell without
    # shellcheck source=/dev/null
    source "$file"
    set -euo pipefail
    break
  fi
done
exec "$@"
