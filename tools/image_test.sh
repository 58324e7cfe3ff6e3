#!/usr/bin/env bash
# Builds the Dockerfile without a Docker engine and tries the image without a network: bash tools/image_test.sh
# As root, on Debian, with buildah and debootstrap (`make image-test` installs them). NVIDIA's image is tens of gigabytes; the base here is
# Debian with Python and torch. Everything lies in build/image, is some 5 GB, and takes a quarter of an hour.
# KEEP=1 keeps it, so that the next run begins with the base.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
TORCH=${TORCH:-torch==2.13.0}
MIRROR=${MIRROR:-http://deb.debian.org/debian}
PYTHON=${PYTHON:-python3}
work=$PWD/build/image
root=$work/root
context=$work/context
mkdir -p "$work/tmp" "$work/wheels" "$work/overlay"/{lower,upper,work,mount}
# overlay where the kernel lets us mount it; vfs copies everything with each layer, 20 GB in all.
if mount -t overlay overlay -o "lowerdir=$work/overlay/lower,upperdir=$work/overlay/upper,workdir=$work/overlay/work" "$work/overlay/mount" 2>/dev/null; then
    umount "$work/overlay/mount"
    driver=overlay
else
    driver=vfs
fi
store=(--root "$work/storage" --runroot "$work/run" --storage-driver "${STORAGE_DRIVER:-$driver}")
export BUILDAH_ISOLATION=chroot TMPDIR=$work/tmp

step() { printf '\n== %s\n' "$*"; }
fail() { echo "image_test.sh: $*" >&2; exit 1; }
checks=0
passed() { checks=$((checks + 1)); echo "ok: $*"; }
clean() {
    [ -n "${KEEP:-}" ] && return
    buildah "${store[@]}" rm --all >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap clean EXIT
rm -rf "$context" "$work/in" "$work/out"

step "wheels: nothing is downloaded while the image is built"
if [ ! -e "$work/wheels/all" ]; then
    "$PYTHON" -m pip --quiet --no-color download --quiet --disable-pip-version-check --dest "$work/wheels" "$TORCH" 'setuptools>=68' wheel pip .
    touch "$work/wheels/all"
fi

step "base: Debian, its Python, torch in a virtual environment that comes first on the path"
if [ ! -e "$root/opt/python/bin/torchrun" ]; then
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" "$MIRROR" >"$work/debootstrap.log" \
        || fail "debootstrap: $(tail -n 3 "$work/debootstrap.log")"
    mkdir -p "$root/wheels"
    mount --bind "$work/wheels" "$root/wheels"
    env -i PATH="$PATH" chroot "$root" sh -ec "python3 -m venv /opt/python && /opt/python/bin/pip install --quiet --no-index --find-links /wheels ${TORCH}" \
        || { umount "$root/wheels"; fail "torch does not install into the base"; }
    umount "$root/wheels"
fi
if ! buildah "${store[@]}" inspect --type image localhost/base >/dev/null 2>&1; then
    container=$(buildah "${store[@]}" from scratch)
    buildah "${store[@]}" add --quiet "$container" "$root" / >/dev/null
    buildah "${store[@]}" config --env PATH=/opt/python/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        --env PIP_NO_INDEX=1 --env PIP_FIND_LINKS=/wheels "$container"
    buildah "${store[@]}" commit --quiet --rm "$container" localhost/base >/dev/null
fi

# The context is what a user has in a checkout, with things in it that must stay outside.
mkdir -p "$context/runs/secret" "$context/.git"
git ls-files -z | xargs -0 cp --parents --target-directory "$context"
echo secret | tee "$context/runs/secret/key" "$context/.git/config" "$context/.env" >/dev/null
build() {  # prints the log
    buildah "${store[@]}" build --layers --network none --volume "$work/wheels:/wheels:ro" --build-arg BASE_IMAGE=localhost/base \
        --tag ee_tuning "$context" 2>&1
}
step "build"
build >"$work/first.log" || fail "the image does not build: $(tail -n 5 "$work/first.log")"
passed "the Dockerfile builds without a network"
step "build again: nothing changed; then with an edited source"
build >"$work/second.log" || fail "the second build fails: $(tail -n 5 "$work/second.log")"
steps=$(grep -c '^STEP [0-9]*/' "$work/second.log") cached=$(grep -c 'Using cache' "$work/second.log")
[ "$(grep -c 'STEP.*\(RUN\|COPY\)' "$work/second.log")" -le "$cached" ] || fail "a second build of the same takes only $cached of $steps steps from the cache"
passed "a second build takes all $cached layers from the cache"
echo '# edited' >>"$context/ee_tuning/cli.py"
build >"$work/third.log" || fail "the third build fails: $(tail -n 5 "$work/third.log")"
grep -q 'Successfully built\|Installing collected' "$work/third.log" && fail "an edited source installs the dependencies anew"
passed "an edited source leaves the layer of dependencies in the cache"

container=$(buildah "${store[@]}" from ee_tuning)
# No network: an empty namespace. Volumes, users and a host name that resolves as `docker run` would give them.
run() { unshare --net sh -c 'ip link set lo up 2>/dev/null; exec "$@"' run buildah "${store[@]}" run --isolation chroot --hostname localhost "$@"; }
inside() { run --user "${user:-ee}" --workingdir /workspace --env HOME="${home:-/home/ee}" --volume "$work/in:/models:ro" \
    --volume "$work/out:/workspace" "$container" -- "$@"; }
refused() {  # what is tried, and its command, which must end in one line
    local tried=$1
    shift
    if inside "$@" >"$work/refused" 2>&1; then fail "not refused: $tried"; fi
    [ "$(grep -c '^ee-tuning: error: ' "$work/refused")" -eq 1 ] && ! grep -q Traceback "$work/refused" \
        || fail "not refused in one line: $tried: $(cat "$work/refused")"
    passed "$tried: $(grep '^ee-tuning: error: ' "$work/refused")"
}
mkdir -p "$work/in" "$work/out"
cp -r examples/tiny-python-llama "$work/in/"
chown 1000:1000 "$work/out"

step "what lies in it"
inside sh -ec '! ls /opt/ee_tuning/runs /opt/ee_tuning/.git /opt/ee_tuning/.env /opt/ee_tuning/tests 2>/dev/null' || fail ".dockerignore lets a secret in"
passed ".dockerignore keeps runs, .git, .env and tests outside"
[ "$(inside id -un)" = ee ] || fail "the image's user is $(inside id -un)"
passed "the image's user is ee"
inside python -c "import torch; assert torch.__version__.startswith('${TORCH#*==}'), torch.__version__" || fail "pip replaced the base's torch"
passed "the base's own torch is in use"
inside python -c 'import socket; socket.create_connection(("10.0.0.1", 80), 2)' 2>/dev/null && fail "there is a network"

step "as the image's user: convert, tune under torchrun, decode, verify"
model=/models/tiny-python-llama
inside ee-tuning --version
inside ee-tuning convert --model $model --exit-layers 3,6 --output exits
inside torchrun --nproc-per-node 2 -m ee_tuning tune --model $model --exits exits --data /opt/ee_tuning/ee_tuning/config \
    --tensor-model-parallel-size 2 --train-iters 2 --seq-length 64 --micro-batch-size 1 --global-batch-size 2 --set tuning.eval_iters=0 \
    --output run
inside ee-tuning generate --model $model --exits run/exit_heads --threshold 0.8 --max-new-tokens 8 --prompt 'def main('
inside ee-tuning verify run
passed "convert, torchrun with two processes, generate and verify, from a model that is mounted read-only"
refused "an output on the read-only mount" ee-tuning convert --model $model --exit-layers 3,6 --output /models/exits

step "as a user whom the image does not know (docker run --user 4321:4321)"
chown 4321:4321 "$work/out"
chmod 755 "$work/out"
user=4321:4321 home=/
inside ee-tuning generate --model $model --exits run/exit_heads --threshold 0.8 --max-new-tokens 8 --prompt 'def main('
inside torchrun --nproc-per-node 2 -m ee_tuning tune --model $model --exits exits --data /opt/ee_tuning/ee_tuning/config \
    --pipeline-model-parallel-size 2 --train-iters 2 --seq-length 64 --micro-batch-size 1 --global-batch-size 2 \
    --set tuning.eval_iters=0 --output theirs
[ "$(stat --format %u "$work/out/theirs/exit_heads")" = 4321 ] || fail "the run does not belong to the user who started it"
passed "an unknown user without a home tunes and decodes; the run is the user's"
user=ee home=/home/ee
refused "an output in another user's folder" ee-tuning convert --model $model --exit-layers 3,6 --output not-mine

printf '\nimage_test.sh: %s checks passed; the image has %s\n' "$checks" \
    "$(buildah "${store[@]}" images --format '{{.Size}}' ee_tuning)"
