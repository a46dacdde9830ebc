#!/usr/bin/env bash
# Start a container that sees this node's NPUs:
#   docker/run.sh IMAGE [COMMAND...]
# DRY_RUN=1 prints the command. MOUNT=/data (or several, by spaces) is mounted where it is.
# DOCKER names another engine (podman). ROOT, for tests, stands in for /.
set -euo pipefail
if [[ $# -lt 1 ]]; then
  echo "usage: docker/run.sh IMAGE [COMMAND...]" >&2
  exit 2
fi
image=$1
shift
root=${ROOT:-}
shopt -s nullglob

devices=()
for path in "$root"/dev/davinci[0-9]*; do
  devices+=(--device "${path#"$root"}")
done
if [[ ${#devices[@]} -eq 0 ]]; then
  echo "error: no NPU on this node (expected /dev/davinci0 and so on; found none). Install the" \
    "driver and firmware; inside a container, run this on the host" >&2
  exit 2
fi
for name in davinci_manager devmm_svm hisi_hdc; do
  if [[ ! -e $root/dev/$name ]]; then
    echo "error: /dev/$name is missing: the driver is not loaded. Reinstall it, or reboot" >&2
    exit 2
  fi
  devices+=(--device "/dev/$name")
done

mounts=()
smi=
for path in /usr/local/bin/npu-smi /usr/local/sbin/npu-smi; do
  if [[ -z $smi && -e $root$path ]]; then
    smi=$path
  fi
done
if [[ -z $smi ]]; then
  echo "warning: no npu-smi in /usr/local/bin or /usr/local/sbin: the container has none" >&2
else
  mounts+=(-v "$smi:$smi:ro")
fi
if [[ ! -d $root/usr/local/Ascend/driver ]]; then
  echo "error: no driver in /usr/local/Ascend/driver. Install it on this node" >&2
  exit 2
fi
for path in /usr/local/Ascend/driver /usr/local/dcmi /etc/ascend_install.info; do
  if [[ -e $root$path ]]; then
    mounts+=(-v "$path:$path:ro")
  fi
done
for path in ${MOUNT:-}; do
  mounts+=(-v "$path:$path")
done

terminal=()
if [[ -t 0 && -t 1 ]]; then
  terminal=(-it)
fi
command=(
  "${DOCKER:-docker}" run --rm "${terminal[@]}" --network=host --ipc=host --shm-size="${SHM_SIZE:-64g}"
  "${devices[@]}" "${mounts[@]}" "$image" "$@"
)
if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
