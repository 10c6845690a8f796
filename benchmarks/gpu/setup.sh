# Sourced on a machine with a GPU: makes `tilewright` importable from the checkout, whatever its name.
mkdir -p /tmp/tilewright-site
ln -sfn "$PWD" /tmp/tilewright-site/tilewright
export PYTHONPATH=/tmp/tilewright-site:$PYTHONPATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
tilewright() { python3 -m tilewright "$@"; }
# Wheels that the machine lacks travel in .whl.
if ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/tilewright-wheels .whl/*.whl
    export PYTHONPATH=$PYTHONPATH:/tmp/tilewright-wheels
fi
