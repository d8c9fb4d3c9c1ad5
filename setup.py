"""Self-evolution knowledge distillation for machine translation: package metadata."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version that ``sekd_fairseq/__init__.py`` states, read without importing it."""
    for line in (HERE / "sekd_fairseq" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("sekd_fairseq/__init__.py states no __version__")


setup(
    name="sekd-fairseq",
    version=version(),
    description="Self-evolution knowledge distillation for machine translation, as a fairseq plugin",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["sekd_fairseq", "sekd_fairseq.*", "analysis", "analysis.*"]),
    package_data={"analysis": ["templates/*.html"]},
    # The fairseq of the extra has wheels for these; README.md tells what to do on others.
    python_requires=">=3.11,<3.13",
    # What the analysis needs: it judges runs on machines that have no torch.
    install_requires=[
        "numpy>=2",
        "msgspec>=0.19",  # run.json as a typed record, checked where it is read
        "pyarrow>=17",  # teacher caches and token records
        "pandas>=2.2",  # analysis
        "scipy>=1.11",  # statistics
        "matplotlib>=3.8",  # figures
        "sacrebleu>=2.4",  # BLEU, chrF, significance
        "jinja2>=3.1",  # HTML pages, everything escaped, and LaTeX tables through pandas
        "markdown-it-py>=3",  # report.md as HTML, raw HTML switched off
        "tqdm>=4.60",  # progress bars
    ],
    extras_require={
        # What trains. fairseq is an extra and not a requirement because every distribution of it
        # installs the same folder: requiring one would overwrite a fairseq that the user has built.
        "fairseq": [
            "ve-fairseq==0.12.3",
            "torch>=2.10",  # the first whose addmm adds products in half precision to a sum in single
            "sentencepiece>=0.2",  # vocabularies
        ],
        "llm": [
            # Hugging Face causal models as teachers and students. transformers 4.56 is the first that takes
            # dtype; 5 renames the key-value cache's argument and needs a torchaudio that loads.
            "transformers>=4.56,<5",
            "peft>=0.15",  # low-rank adapters
            "gguf>=0.16",  # reading GGUF files
            "protobuf>=4",  # SentencePiece's model format, for transformers and for GGUF files
        ],
        "served": ["httpx>=0.27"],  # teachers behind a server: parallel requests, timeouts
        "storage": ["fsspec>=2024.6", "s3fs>=2024.6"],  # caches in object storage
        "deploy": ["ctranslate2>=4.6"],  # students without torch and fairseq
        "workflow": ["snakemake>=9,<10"],  # scripts/Snakefile: restarts, parallel jobs, clusters
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",  # the tests in several processes
            "filelock>=3",  # what their processes share is made once
            "hypothesis>=6",
            "httpx>=0.27",  # the tests of served teachers
            # A real S3 server for the tests of object storage, and what speaks to it.
            "s3fs>=2024.6",
            "moto[s3]>=5",
            "flask>=3",
            "flask-cors>=4",
            "ctranslate2>=4.6",  # the tests of deployed students
            "triton>=3.5; platform_system == 'Linux'",  # its interpreter proves the GPU kernels on a CPU
            "coverage>=7.10",  # follows forks and os._exit
            "ruff>=0.9",
            "mypy>=1.14",
            "pandas-stubs",
            "types-tqdm",
            "snakemake-executor-plugin-slurm>=2",  # the plan of scripts/slurm
            "selenium>=4.20",  # the report in a real browser, where there is chromium
        ],
    },
    entry_points={
        "console_scripts": [
            "sekd-prepare-data = sekd_fairseq.prepare_data:main",
            "sekd-prepare-llm-data = sekd_fairseq.prepare_llm_data:main",
            "sekd-import-hf = sekd_fairseq.import_hf:main",
            "sekd-export-hf = sekd_fairseq.export_hf:main",
            "sekd-build-cache = sekd_fairseq.build_cache:main",
            "sekd-copy-cache = sekd_fairseq.copy_cache:main",
            "sekd-inspect-cache = sekd_fairseq.inspect_cache:main",
            "sekd-align-cache = sekd_fairseq.align_cache:main",
            "sekd-distilled-data = sekd_fairseq.distilled_data:main",
            "sekd-join-data = sekd_fairseq.join_data:main",
            "sekd-rounds = sekd_fairseq.rounds:main",
            "sekd-score = sekd_fairseq.score:main",
            "sekd-evaluate = sekd_fairseq.evaluate:main",
            "sekd-tune-lenpen = sekd_fairseq.tune_lenpen:main",
            "sekd-options = sekd_fairseq.options:main",
            "analysis-transfer = analysis.transfer:main",
            "analysis-compare = analysis.compare:main",
            "analysis-plan = analysis.plan:main",
            "analysis-sizes = analysis.sizes:main",
            "analysis-gap = analysis.gap:main",
            "analysis-figures = analysis.figures:main",
        ]
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "License :: OSI Approved :: MIT License",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
