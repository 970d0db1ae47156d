"""A stand-in for MU-Bench, written into a folder: its shapes and its failures, none of its code.

It is not MU-Bench. It has the names, signatures and order of calls that the adapter meets there, on
200 tiny images and a net that trains in no time, so that tests need neither a checkout nor a
certain transformers. Like the original it cannot be imported without help: its front asks for a
package that nobody has, and its evaluation for a metric of the network.
"""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

INDICES = [153, 7, 88, 121, 42, 3, 199, 64, 10, 171, 35, 98, 5, 77, 140, 26, 112, 59, 187, 131]
FILES: dict[str, str] = {}

FILES["mubench/__init__.py"] = """
    from . import stats
    from .args import UnlearningArguments
    from .data.base import load_unlearn_data
    from .utils import load_base_model
    from .trainer import get_trainer

    num_classes_map = {'cifar10': 10}
    model_map_rev = {'microsoft/resnet-18': 'resnet-18', 'google/vit-base': 'vit-base'}
    model_map = {short: name for name, short in model_map_rev.items()}
    from .utils import TinyNet
    model_cls_map = {'cifar10': TinyNet}
    from transformers_for_cl import AutoModelForImageClassification as Curriculum
    model_cls_cl_map = {'cifar10': Curriculum}
"""

FILES["mubench/stats.py"] = """
    reads = {}      # name of a split -> rows that were decoded
    copies = 0      # datasets that were decoded and copied whole
    def read(name, count):
        reads[name] = reads.get(name, 0) + count
"""

FILES["mubench/args.py"] = """
    from dataclasses import dataclass

    @dataclass
    class UnlearningArguments:
        unlearn_method: str = 'neggrad'
        del_ratio: float = 1.0
        alpha: float = 0.5
        data_name: float = None
        backbone: str = None
        random_seed: int = None
        use_so_info: bool = False
        use_cl: bool = False
        use_lora: bool = False
        lora_ratio: int = 10
        use_mode_connectivity: bool = False
        mc_curve_type: str = 'linear'
        mc_num_bends: int = 3

        def __post_init__(self):
            self.unlearn_method = self.unlearn_method.lower()
"""

FILES["mubench/original_performance.py"] = """
    orig_acc = {'cifar10': {'random': 0.1, 'vit-base': {'dt': 0.9, 'dr': 1.0, 'ood': 0}}}
"""

FILES["mubench/utils.py"] = """
    import types
    import torch
    from torch import nn
    import mubench

    class TinyNet(nn.Module):
        def __init__(self, num_labels=10):
            super().__init__()
            self.config = types.SimpleNamespace(num_labels=num_labels)
            self.body = nn.Linear(192, 16)
            self.norm = nn.BatchNorm1d(16)
            self.classifier = nn.Linear(16, num_labels)

        def forward(self, pixel_values, labels=None):
            z = self.classifier(torch.relu(self.norm(self.body(pixel_values.flatten(1)))))
            loss = None if labels is None else nn.functional.cross_entropy(z, labels)
            return types.SimpleNamespace(logits=z, loss=loss)

        @classmethod
        def from_pretrained(cls, name, num_labels=10, ignore_mismatched_sizes=False):
            return cls(num_labels)

    def load_base_model(unlearn_config):
        from mubench.data.base import load_cifar10
        state = torch.get_rng_state()
        torch.manual_seed(0)
        net, rows = TinyNet(), load_cifar10()['train']
        pixels = torch.stack([torch.tensor(i) for i in rows.rows['image']])
        x = (pixels.permute(0, 3, 1, 2) / 255 - .5) / .25
        y = torch.tensor(rows.rows['label'])
        steps = torch.optim.Adam(net.parameters(), lr=.02)
        for _ in range(40):
            steps.zero_grad()
            nn.functional.cross_entropy(net(x).logits, y).backward()
            steps.step()
        torch.set_rng_state(state)
        return net.eval()
"""

FILES["mubench/data/__init__.py"] = ""

FILES["mubench/data/preprocess.py"] = """
    import numpy as np
    import torch
    import mubench

    class AutoImageProcessor:
        image_mean, image_std = [.5, .5, .5], [.25, .25, .25]
        @classmethod
        def from_pretrained(cls, name):
            return cls()

    def tokenize_data(unlearn_config, raw_datasets):
        processor = AutoImageProcessor.from_pretrained(mubench.model_map[unlearn_config.backbone])
        statistics = processor.image_mean, processor.image_std
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in statistics)

        def fixed(row):
            row['pixel_values'] = (torch.tensor(row['image']).permute(2, 0, 1) / 255 - mean) / std
            return row

        def mirrored(row):
            row = fixed(row)
            if np.random.rand() < .5:
                row['pixel_values'] = row['pixel_values'].flip(2)
            return row

        for split in raw_datasets:
            raw_datasets[split].set_transform(mirrored if 'train' in split else fixed)
            raw_datasets[split].name = split
        return raw_datasets

    def collate(examples):
        out = {'pixel_values': torch.stack([one['pixel_values'] for one in examples]),
               'labels': torch.tensor([one['label'] for one in examples])}
        if 'is_df' in examples[0]:
            out['is_df'] = torch.tensor([one['is_df'] for one in examples])
        return out

    all_dataset_collators = {'cifar10': collate}
"""

FILES["mubench/data/base.py"] = """
    import os
    import numpy as np
    import mubench
    from .preprocess import tokenize_data

    class Dataset:
        def __init__(self, rows):
            self.rows, self.transform, self.name = rows, None, None
        def __len__(self):
            return len(self.rows['label'])
        @property
        def shape(self):
            return len(self), len(self.rows)
        def set_transform(self, transform):
            self.transform = transform
        def select(self, indices):
            found = Dataset({k: [v[int(i)] for i in indices] for k, v in self.rows.items()})
            found.transform, found.name = self.transform, self.name
            return found
        def __getitem__(self, key):
            if isinstance(key, str):
                if self.transform is not None:
                    raise KeyError('image')     # a transform of columns finds no image in one
                return list(self.rows[key])
            if not isinstance(key, int):
                return {k: [v[int(i)] for i in key] for k, v in self.rows.items()}
            mubench.stats.read(self.name, 1)
            row = {k: v[key] for k, v in self.rows.items()}
            return row if self.transform is None else self.transform(row)
        @classmethod
        def from_dict(cls, rows):
            mubench.stats.copies += 1
            return cls(rows)

    def load_cifar10():
        rng = np.random.default_rng(0)
        shapes = rng.integers(40, 216, (10, 8, 8, 3))
        def part(count):
            y = rng.permutation(np.arange(count) % 10)
            x = np.clip(shapes[y] + rng.normal(0, 40, (count, 8, 8, 3)), 0, 255).astype(np.uint8)
            return Dataset({'image': list(x), 'label': [int(one) for one in y]})
        return {'train': part(200), 'test': part(60)}

    def prepare_df_dr(unlearn_config, train_dataset):
        del_idx = np.loadtxt(f'{mubench.__path__[0]}/df/{unlearn_config.data_name}.txt', dtype=int)
        del_idx = del_idx[:int(unlearn_config.del_ratio / 10 * len(del_idx))]
        mask = np.zeros(train_dataset.shape[0], dtype=bool)
        mask[del_idx] = True
        every = np.arange(len(mask))
        return (Dataset.from_dict(train_dataset[every[mask]]),
                Dataset.from_dict(train_dataset[every[~mask]]))

    def method_specific_transformation(unlearn_config, raw_datasets, df_data, dr_data,
                                       is_generative_task, label_col='label'):
        return raw_datasets

    def prepare_unlearning_data(unlearn_config, raw_datasets, label_col='label',
                                is_generative_task=False, do_method_specific_transformation=True):
        df_data, dr_data = prepare_df_dr(unlearn_config, raw_datasets['train'])
        raw_datasets['orig_train'] = raw_datasets['train']
        raw_datasets['df'], raw_datasets['dr'] = df_data, dr_data
        if do_method_specific_transformation and unlearn_config.unlearn_method == 'neggrad':
            raw_datasets['train'] = Dataset.from_dict(dict(df_data.rows))
        return raw_datasets

    def load_unlearn_data(unlearn_config, tokenize=True):
        dataset_loaders = {'cifar10': load_cifar10}
        raw_datasets = dataset_loaders[unlearn_config.data_name]()
        raw_datasets = prepare_unlearning_data(unlearn_config, raw_datasets)
        return tokenize_data(unlearn_config, raw_datasets) if tokenize else raw_datasets
"""

FILES["mubench/evaluation.py"] = """
    import evaluate
    import nltk
    import numpy as np
    from scipy.spatial.distance import jensenshannon
    from scipy.special import softmax
    from sklearn.metrics import roc_auc_score
    from .original_performance import orig_acc

    metric_acc = evaluate.load("accuracy")
    DRAWS = 5

    class Evaluator:
        def __init__(self, unlearn_config, metric_names=['accuracy']):
            self.unlearn_config, self.metric_names = unlearn_config, metric_names
            self.metrics = {}
            self.evaluator = {name: evaluate.load(name) for name in metric_names}

        def compute(self, dt_pred, dt_label, df_pred, df_label, dr_pred=None, dr_label=None,
                    ood_pred=None, ood_label=None):
            def accuracy(z, y):
                found = self.evaluator['accuracy'].compute(references=y, predictions=z.argmax(1))
                return found['accuracy']
            found = self.metrics
            found['dt_accuracy'] = accuracy(dt_pred, dt_label)
            found['df_accuracy'] = accuracy(df_pred, df_label)
            if dr_pred is not None:
                found['dr_accuracy'] = accuracy(dr_pred, dr_label)
                self.get_knowledge_gap(dr_pred, dr_label, df_pred, df_label)
                self.get_zero_retrain_forgetting_score(df_pred)
            table = orig_acc[self.unlearn_config.data_name]
            orig, chance = table[self.unlearn_config.backbone]['dt'], table['random']
            dt, df = found['dt_accuracy'], found['df_accuracy']
            a, b = 1 - abs(dt - orig), 1 - abs(df - chance)
            overall = 2 * a * b / (a + b)
            limit = .4 if self.unlearn_config.unlearn_method in ['neggrad', 'grad_ascent'] else .2
            if abs(dt - orig) / orig > limit or (df < chance and (chance - df) / chance > .2):
                overall = 0
            found['unlearn_overall_accuracy'] = overall
            return found

        def get_knowledge_gap(self, dr_pred, dr_label, df_pred, df_label):
            right_f, right_r = df_pred.argmax(1) == df_label, dr_pred.argmax(1) == dr_label
            size = len(right_f)
            draws = [
                roc_auc_score([1] * size + [0] * size, np.r_[
                    np.random.choice(right_r, size, replace=False), right_f].astype(int))
                for _ in range(DRAWS)]
            self.metrics['knowledge_gap'] = float(np.mean(draws))

        def get_zero_retrain_forgetting_score(self, df_pred):
            p = softmax(df_pred, 1)
            draws = [
                1 - (jensenshannon(p, softmax(np.random.rand(*p.shape), 1), axis=1) ** 2).mean()
                for _ in range(DRAWS)]
            self.metrics['zrf'] = float(np.mean(draws))
"""

FILES["mubench/trainer/__init__.py"] = """
    from .base import GradAscentTrainer

    def get_trainer(trainer_name):
        trainer_methods = {'neggrad': GradAscentTrainer}
        if trainer_name in trainer_methods:
            return trainer_methods[trainer_name]
        raise ValueError(f"Trainer '{trainer_name}' not found.")
"""

FILES["mubench/trainer/base.py"] = """
    import json
    import os
    import time
    import types
    import numpy as np
    import torch
    import wandb
    from safetensors.torch import save_file
    import mubench
    from ..evaluation import Evaluator
    from ..data.preprocess import all_dataset_collators
    from ..utils import load_base_model

    class UnlearningTrainer:
        slow_evaluation = 0

        def __init__(self, **kwargs):
            self.raw_datasets = kwargs.pop('raw_datasets')
            self.unlearn_config = kwargs.pop('unlearn_config')
            self.args = kwargs.pop('args')
            self.unlearn_evaluator = Evaluator(self.unlearn_config)
            self.model = kwargs.pop('model', None) or load_base_model(self.unlearn_config)
            self.data_collator = all_dataset_collators[self.unlearn_config.data_name]
            self.num_labels = mubench.num_classes_map[self.unlearn_config.data_name]
            self.unlearn_time = None
            self.method_specific_setup()

        def method_specific_setup(self):
            raise NotImplementedError  # as there: every method brings its own

        def unlearn(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None,
                    **kwargs):
            start = time.time()
            out = self.method_specific_unlearn(
                resume_from_checkpoint, trial, ignore_keys_for_eval, **kwargs)
            self.unlearn_time = time.time() - start
            return out

        def method_specific_unlearn(self, resume_from_checkpoint=None, trial=None,
                                    ignore_keys_for_eval=None, **kwargs):
            raise NotImplementedError  # as there: every method brings its own

        def get_eval_dataloader(self, eval_dataset=None):
            return torch.utils.data.DataLoader(
                eval_dataset, batch_size=self.args.per_device_eval_batch_size,
                collate_fn=self.data_collator)

        def evaluation_loop(self, dataloader, description, prediction_loss_only=None,
                            ignore_keys=None, metric_key_prefix='eval'):
            time.sleep(self.slow_evaluation)
            self.model.eval()
            with torch.no_grad():
                pairs = [(self.model(b['pixel_values']).logits, b['labels']) for b in dataloader]
            z, y = (torch.cat(column) for column in zip(*pairs))
            metrics = {'loss': torch.nn.functional.cross_entropy(z, y).item(),
                       'accuracy': (z.argmax(1) == y).float().mean().item(),
                       'model_preparation_time': 0.001}
            metrics = {f'{metric_key_prefix}_{k}': v for k, v in metrics.items()}
            return types.SimpleNamespace(
                predictions=z.numpy(), label_ids=y.numpy(), metrics=metrics, num_samples=len(y))

        def evaluate_unlearn(self, eval_splits=['test', 'df', 'dr', 'ood'], ignore_keys=None):
            found = []
            for split in eval_splits:
                if split not in self.raw_datasets:
                    continue
                output = self.evaluation_loop(
                    self.get_eval_dataloader(self.raw_datasets[split]),
                    description=split.capitalize(), ignore_keys=ignore_keys,
                    metric_key_prefix=split)
                path = os.path.join(self.args.output_dir, f'pred_logit_{split}')
                np.save(path, output.predictions)
                found.extend([output.predictions, output.label_ids])
                self.save_metrics(split, output.metrics)
            metrics = self.unlearn_evaluator.compute(*found)
            metrics['unlearn_time'] = -1 if self.unlearn_time is None else self.unlearn_time
            return metrics

        def save_metrics(self, split, metrics):
            folder = self.args.output_dir
            def write(name, tree):
                with open(os.path.join(folder, name), 'w') as file:
                    json.dump(tree, file, indent=4, sort_keys=True)
            write(f'{split}_results.json', metrics)
            path = os.path.join(folder, 'all_results.json')
            before = json.load(open(path)) if os.path.exists(path) else {}
            write('all_results.json', {**before, **metrics})

        def save_model(self):
            os.makedirs(self.args.output_dir, exist_ok=True)
            state = {k: v.contiguous() for k, v in self.model.state_dict().items()}
            save_file(state, os.path.join(self.args.output_dir, 'model.safetensors'))
            for name in ('config.json', 'training_args.bin'):
                open(os.path.join(self.args.output_dir, name), 'w').write('{}')

        def save_state(self):
            open(os.path.join(self.args.output_dir, 'trainer_state.json'), 'w').write('{}')

        def create_model_card(self):
            open(os.path.join(self.args.output_dir, 'README.md'), 'w').write('a card')

    class GradAscentTrainer(UnlearningTrainer):
        def method_specific_setup(self):
            pass
        def method_specific_unlearn(self, *args, **kwargs):
            train = self.raw_datasets['train']
            steps = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
            batch = self.data_collator([train[i] for i in range(len(train))])
            (-self.model(**batch).loss).backward()
            steps.step()
"""

FILES["experiment/cifar10/unlearn.py"] = """
    import dataclasses
    import json
    import os
    import sys
    import types
    import wandb
    import mubench
    from mubench.args import UnlearningArguments
    from mubench.trainer import get_trainer
    from mubench.data.base import load_unlearn_data
    import numpy as np
    import torch

    KNOWN = {
        'model_name_or_path', 'dataset_name', 'output_dir', 'seed', 'do_train', 'do_eval',
        'num_train_epochs', 'learning_rate', 'weight_decay', 'per_device_train_batch_size',
        'per_device_eval_batch_size', 'eval_strategy', 'save_strategy', 'load_best_model_at_end',
        'metric_for_best_model', 'report_to', 'remove_unused_columns', 'push_to_hub',
        'dataloader_num_workers', 'image_column_name', 'label_column_name', 'overwrite_output_dir',
    }

    def main():
        given = json.load(open(os.path.abspath(sys.argv[1])))
        own = {one.name for one in dataclasses.fields(UnlearningArguments)}
        unknown = set(given) - KNOWN - own
        if unknown:
            raise ValueError(f'Some keys are not used: {sorted(unknown)}')
        config = UnlearningArguments(**{k: v for k, v in given.items() if k in own})
        usual = dict(seed=42, num_train_epochs=3, learning_rate=5e-5, weight_decay=0.0,
                     per_device_train_batch_size=8, per_device_eval_batch_size=8, use_cpu=True,
                     world_size=1, device=torch.device('cpu'))
        rest = {k: v for k, v in given.items() if k not in own}
        args = types.SimpleNamespace(**{**usual, **rest})
        config.data_name, config.random_seed = args.dataset_name, args.seed
        config.backbone = mubench.model_map_rev[args.model_name_or_path]
        config.use_lora = False
        args.metric_for_best_model = 'unlearn_overall_' + args.metric_for_best_model
        np.random.seed(args.seed)
        torch.manual_seed(args.seed)
        raw_datasets = load_unlearn_data(config)
        trainer = get_trainer(config.unlearn_method)(
            raw_datasets=raw_datasets, args=args, unlearn_config=config)
        trainer.unlearn(resume_from_checkpoint=None)
        trainer.save_model()
        trainer.save_state()
        metrics = trainer.evaluate_unlearn()
        trainer.save_metrics('unlearn_final', metrics)
        trainer.create_model_card()

    if __name__ == '__main__':
        main()
"""


@contextlib.contextmanager
def modules_kept() -> Iterator[None]:
    """Forget afterwards what was imported under the name `mubench`; another one may follow."""
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "mubench":
                del sys.modules[name]


def build_mubench(folder: Path) -> Path:
    """Write the stand-in into `folder` and return its root."""
    root = folder / "MU-Bench"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    (root / "mubench" / "df").mkdir()
    lines = "\n".join(map(str, INDICES))
    (root / "mubench" / "df" / "cifar10.txt").write_text(lines + "\n", encoding="utf-8")
    return root


def write_config(root: Path, out: Path, method: str, block: object = None, **more: object) -> Path:
    """Write a configuration for the script of the stand-in, with the output at `out`."""
    config = {
        "do_train": True,
        "do_eval": True,
        "dataset_name": "cifar10",
        "model_name_or_path": "microsoft/resnet-18",
        "unlearn_method": method,
        "del_ratio": 2.0,
        "seed": 42,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "learning_rate": 1e-2,
        "weight_decay": 1e-4,
        "evaluation_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "dataloader_num_workers": 16,
        "output_dir": str(out),
        **more,
    }
    if block is not None:
        config["unsc_plugin"] = block
    path = root.parent / f"{out.name}-{method}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path
