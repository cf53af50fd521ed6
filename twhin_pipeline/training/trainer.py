"""Trainer: the loop from the first step to the written model."""

from __future__ import annotations

import json
import threading
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.recipes import Recipe
from twhin_pipeline.config.stage_settings import settings
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation import ancestors
from twhin_pipeline.graph import vocabulary
from twhin_pipeline.model.anchors import Anchor
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.losses import LOSSES
from twhin_pipeline.model.twhin_model import TwhinModel, TwhinModelAndLoss
from twhin_pipeline.sharding.distributed import Agreement, Ranks
from twhin_pipeline.sharding.machine import give_back_memory
from twhin_pipeline.sharding.optimizer import apply_optimizers, build_optimizer
from twhin_pipeline.sharding.optimizer_state import OptimizerState
from twhin_pipeline.sharding.placement import (
    limit_norms,
    local_shards,
    log_sharded_tensor_content,
    maybe_shard_model,
    table_weights,
    unwrapped,
)
from twhin_pipeline.sharding.torchrec_tables import empty_caches
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables
from twhin_pipeline.store import Draft, Store, database, locks
from twhin_pipeline.tracking import QuietRun, Run, open_run
from twhin_pipeline.training import warm_start
from twhin_pipeline.training.checkpoint import CheckpointFolder, folder_of
from twhin_pipeline.training.dataset import EdgesDataset, table_sizes
from twhin_pipeline.training.launch import TrainingCancelled
from twhin_pipeline.training.progress import LOSSES_SCHEMA, METRICS_SCHEMA, Interval, Progress
from twhin_pipeline.training.reporting import Reporter, ValidationRecord
from twhin_pipeline.training.validation import LOWER_IS_BETTER, Validator
from twhin_pipeline.vectors.model_files import ASSET, Writer

PROGRESS_EVERY_S = 0.2


class Trainer:
    """One training of one snapshot, by one rank among others. `run` does it all; `step` is the heart of it."""

    def __init__(
        self,
        config: TwhinConfig,
        store: Store,
        snapshot: str,
        ranks: Ranks,
        reporter: Reporter,
        save_dir: str | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """Open the data, build and shard the model, and take the folder of checkpoints.

        Raises:
            UserError: Something does not fit, or another run trains here.
        """
        self.config, self.store, self.snapshot, self.ranks, self.reporter = config, store, snapshot, ranks, reporter
        self.recipe = recipe
        self.started = time.monotonic()
        training = config.training
        torch.manual_seed(training.seed)
        torch.backends.cuda.matmul.allow_tf32 = config.runtime.enable_tensorfloat32
        torch.backends.cudnn.allow_tf32 = config.runtime.enable_tensorfloat32

        self.parents = self._parents()
        self.compacted = vocabulary.compactions(config, store, snapshot)
        """By entity type, the snapshot that numbered its rows anew: a checkpoint says whose rows it has."""
        self.started_from: tuple[ancestors.Origin, ...] = ()
        """The models whose vectors the tables started from."""
        self.dataset = EdgesDataset(config, store, snapshot, "train", ranks.rank, ranks.world_size, ranks.device)
        self.steps_before = 0
        """Steps that the optimizers' state had seen when the tables started from an earlier model."""
        self.anchors: dict[str, Anchor] = {}
        """What holds the known ids of tables with `pull` or `freeze`."""
        self.untrained: dict[str, np.ndarray[Any, Any]] = {}
        """By entity type, on rank 0, the rows that keep the vectors that were drawn for them."""
        self.validator: Validator | None = None

        tables = UnshardedTables(config.model, table_sizes(config, store, snapshot), ranks.device)
        if config.model.operator_init == "random":
            torch.manual_seed(training.seed)  # tables that are not to be sharded have drawn numbers
        model = TwhinModel(config.model, tables, ranks.device)
        edges = self.dataset.chunks_per_step * int(self.dataset.positives.lengths.max())
        self.sharded = maybe_shard_model(apply_optimizers(model, config.model), ranks.device, config.launch, edges)
        self.optimizer, self.schedule = build_optimizer(self.sharded, config.model, self._total_steps(done=0))
        loss = LOSSES[config.loss.name](config.loss)
        self.model = TwhinModelAndLoss(self.sharded, loss, config.model, amp=config.runtime.enable_amp).to(ranks.device)

        folder = folder_of(config, store, snapshot, save_dir)
        self.checkpoints = CheckpointFolder(folder, ranks, training.checkpoint_max_to_keep)
        # Of several nodes the one that held the leases may have died, and come back as another machine.
        self.wait_s = locks.LEASE_S + locks.RENEW_S if config.launch.nnodes > 1 else None
        self.checkpoints.acquire(self.wait_s)
        self.interval = Interval(config.model.relation_names, ranks)
        self.progress = Progress()
        self.tracking: Run | QuietRun = QuietRun()

    def run(self, stop: threading.Event) -> dict[str, Any]:
        """Train to the end and write the model; return the details of its manifest.

        Raises:
            TrainingCancelled: `stop` was set, and a checkpoint was written.
            UserError: A loss is not finite, or vectors to start from do not fit.
        """
        locked = ExitStack()
        try:
            self._lock(locked)
            self._start()
            reason = self._loop(stop)
            details = self._write_model(reason)
            self.checkpoints.finish({"steps": self.progress.step, "stop_reason": reason})
            self.tracking.finish("FINISHED")
        except BaseException as error:
            self.tracking.finish("KILLED" if isinstance(error, (TrainingCancelled, KeyboardInterrupt)) else "FAILED")
            raise
        finally:
            self.checkpoints.release()
            locked.close()
        self.reporter.finished(details)
        return details

    def _lock(self, locked: ExitStack) -> None:
        """Exclude other writers of this snapshot's model, from the first step to the last. All ranks fail together."""
        problem = None
        if self.ranks.rank == 0:
            try:
                locked.enter_context(self.store.writing(self.snapshot, [ASSET], self.wait_s))
            except UserError as error:
                problem = str(error)
        problem = self.ranks.broadcast(problem)
        if problem:
            raise UserError(problem)

    def step(self, batch: EdgeBatch) -> torch.Tensor:
        """Take one step: forward, backward with the tables' updates in it, the operators' update, the schedules.

        Returns:
            This rank's loss, a scalar whose mean over ranks is the step's.
        """
        loss, outputs = self.model(batch)
        self.interval.add(self.progress.step + 1, loss.detach(), outputs, batch)
        if self.ranks.device.type == "cpu":
            self.interval.check_finite()  # before the tables take the gradient
        self.optimizer.zero_grad()
        loss.backward()
        self.progress.rates = self.schedule.rates()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _newest_sound(self) -> int | None:
        """Return the step of the newest checkpoint whose files are as they were written; say which are damaged.

        Damaged ones are removed, so that the run writes them again. For rank 0; None on others.
        """
        if self.ranks.rank != 0:
            return None
        for step in reversed(self.checkpoints.steps()):
            problem = self.checkpoints.problem(step)
            if problem is None:
                return step
            self.reporter.milestone(f"{self.checkpoints.step_path(step)} is damaged: {problem}; it is not used")
            self.checkpoints.remove(step)
        return None

    def _start(self) -> None:
        """Resume where an unfinished run of the same configuration and training set left off, else begin."""
        latest = None if self.checkpoints.finished() else self.ranks.broadcast(self._newest_sound())
        state = self.ranks.broadcast(
            self.checkpoints.read_state(latest) if latest is not None and self.ranks.rank == 0 else None
        )
        if latest is not None and state is not None and state["training_set"] == self.dataset.version:
            self.checkpoints.load(latest, self._tensors())
            self._load_state(state)
            self.reporter.milestone(f"resumed from step {latest:,} ({self.checkpoints.step_path(latest)})")
        else:
            self.checkpoints.clear()
            state = OptimizerState(self.sharded, self.optimizer, self.config.model)
            self.started_from, self.steps_before = warm_start.initialize(
                self.sharded, state, self.config, self.store, self.snapshot, self.ranks, self.reporter.milestone
            )
        self.anchors = warm_start.anchors(
            self.config, self.store, self.snapshot, self.started_from, self.reporter.milestone
        )
        unwrapped(self.sharded).anchors = self.anchors
        if self.ranks.rank == 0:
            self.untrained = self._untrained_rows()
        self.validator = self._open_validation()
        self.ranks.barrier()  # a rank may read the rows that another has filled (shared_tables)
        if self.ranks.rank == 0:
            self.tracking = open_run(self.store, self.snapshot, self.config, self.progress.mlflow_run_id)
            self.progress.mlflow_run_id = self.tracking.run_id
            self.tracking.log_config(self.config, world_size=self.ranks.world_size, training_set=self.dataset.version)
            self.tracking.log_dataset(self.store, self.snapshot, "training_set/positives", "training")
            if self.validator is not None:
                self.tracking.log_dataset(self.store, self.snapshot, "held_out/validation", "validation")
            self.tracking.log_text(str(self.sharded.sharding_plan_text), "sharding_plan.txt")
            if self.recipe:
                self.tracking.log_text(self.recipe.explanation(), "recipe.txt")
            if self.config.tune.outcome:
                self.tracking.log_text(json.dumps(self.config.tune.outcome, indent=1), "tuned.json")
        self.progress.mlflow_run_id = self.ranks.broadcast(self.progress.mlflow_run_id)
        self.total = self._total_steps(self.progress.step)
        give_back_memory()
        self.reporter.milestone(
            f"training {self.snapshot}: {self.dataset.num_edges:,} edges, {self.config.training.num_epochs} epoch(s) "
            f"of {self.dataset.steps_per_epoch:,} steps, to step {self.total:,}, {self.ranks.world_size} process(es) "
            f"on {self.ranks.device.type}; ready in {time.monotonic() - self.started:.1f} s"
        )

    def _untrained_rows(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return `warm_start.untrained_rows` while the earlier model is there; that of a resumed run may be gone."""
        try:
            return warm_start.untrained_rows(self.config, self.store, self.snapshot, self.started_from)
        except UserError as error:
            self.reporter.milestone(f"departed ids count as trained, as the earlier model is gone: {error}")
            return {}

    def _open_validation(self) -> Validator | None:
        """Open the validation set, without edges that a model was trained on which this one started from."""
        training, asset = self.config.training, "held_out/validation"
        held_out = self.store.manifest(asset, self.snapshot) if self.store.exists(asset, self.snapshot) else None
        if held_out is None or not held_out.rows or not (training.num_eval_steps or training.ranks_everything):
            return None
        seen = self.ranks.broadcast(self._seen_before(asset) if self.ranks.rank == 0 else None)
        if len(seen) >= held_out.rows:
            self.reporter.milestone("no validation edge is left, so the model is that of the last step")
            return None
        return Validator(self.config, self.store, self.snapshot, self.ranks, seen)

    def _seen_before(self, asset: str) -> ancestors.SeenBefore:
        """Return the held-out edges that ancestors were trained on, and say how many there are."""
        files = self.store.files(asset, self.snapshot)
        with database.connect(self.config, self.store) as con:
            seen = ancestors.find(con, self.config, self.store, self.snapshot, self.started_from, files)
        if seen.ancestors:
            self.reporter.milestone(
                f"{len(seen):,} validation edges are left out: the model starts from one that was trained on them"
            )
        for one in seen.unknown:
            self.reporter.milestone(f"validation edges that an earlier model was trained on are not known: {one}")
        return seen

    def _total_steps(self, done: int) -> int:
        """Return the steps of the whole training, of which `done` are made: how many are left depends on the ranks."""
        return max(done, min(done + self.dataset.steps_left, self.config.training.num_train_steps))

    def _loop(self, stop: threading.Event) -> str:
        """Take steps until something ends them; return what did."""
        training, progress = self.config.training, self.progress
        agreement = Agreement(self.ranks)
        reason = self._stop_reason()
        batches = iter(self.dataset)
        self.interval.restart()
        progress.restart()
        last_shown = 0.0
        try:
            while reason is None:
                agreement.start(stop.is_set())
                batch = next(batches).to(self.ranks.device, non_blocking=True)
                loss = self.step(batch)
                progress.advance(batch.global_edges, self.interval)
                stopped = agreement.wait()
                if time.monotonic() - last_shown > PROGRESS_EVERY_S and self.ranks.rank == 0:
                    last_shown = time.monotonic()
                    self.reporter.progress(progress.step, self.total, float(loss), self.interval.rate)
                if progress.step % training.train_log_every_n == 0:
                    self._log()
                improved = False
                if self._evaluation_is_due():
                    improved = self._evaluate()
                reason = self._stop_reason()
                if stopped and reason is None:
                    self._save(wait=True)
                    raise TrainingCancelled(
                        f"stopped at step {progress.step:,}; the same command goes on from its checkpoint"
                    )
                if improved or progress.step % training.checkpoint_every_n == 0:
                    self._save()
        finally:
            batches.close()  # type: ignore[attr-defined]  # ends the thread that reads ahead
        self._log()
        self._evaluate()
        self._save(wait=True)
        last = progress.losses[-1]
        self.reporter.progress(progress.step, progress.step, last["loss"], last["edges_per_second"])
        self.reporter.milestone(f"ended after step {progress.step:,}: {reason}")
        return reason

    def _evaluation_is_due(self) -> bool:
        epochs = self.config.training.eval_every_n_epochs
        if epochs is None:
            return self.progress.step % self.config.training.eval_log_every_n == 0
        return self.dataset.chunks_done == 0 and self.dataset.epoch % epochs == 0

    def _stop_reason(self) -> str | None:
        training, progress = self.config.training, self.progress
        patience = training.early_stopping_patience
        if patience is not None and progress.evaluations_without_gain >= patience:
            metric = training.selection_metric
            return f"early stopping: {patience} evaluation(s) did not better {metric} (best at {progress.best_step:,})"
        if self.dataset.epoch >= self.dataset.num_epochs:
            return f"num_epochs ({training.num_epochs}) is reached"
        if progress.step >= training.num_train_steps:
            all_steps = training.num_epochs * self.dataset.steps_per_epoch
            return (
                f"num_train_steps ({training.num_train_steps:,}) comes before the end of num_epochs "
                f"({training.num_epochs}), which takes {all_steps:,} steps"
            )
        return None

    def _log(self) -> None:
        """Log the steps since the last log line, of all ranks."""
        if not self.interval.steps:
            return
        record = self.interval.close(self.progress.step, self.dataset.epoch_of_last_batch)
        record |= {f"learning_rate/{group}": rate for group, rate in self.progress.rates.items()}
        self.progress.losses.append(record)
        self.tracking.log_metrics(
            {k if "/" in k else f"train/{k}": v for k, v in record.items() if k != "step"}, self.progress.step
        )
        self.reporter.milestone(
            f"step {self.progress.step:,} of {self.total:,}  epoch {record['epoch']}  loss {record['loss']:.4f}  "
            f"{record['edges_per_second']:,.0f} edges/s"
        )
        weights = table_weights(self.sharded)
        for table in self.config.model.embeddings.tables_to_log or ():
            norms = log_sharded_tensor_content("weight", table, weights[table])
            self.tracking.log_metrics({f"norms/{key}": value for key, value in norms.items()}, self.progress.step)

    def _evaluate(self) -> bool:
        """Evaluate on the validation set, unless that was just done; return whether it is the best so far."""
        progress, metric = self.progress, self.config.training.selection_metric
        if self.validator is None or progress.evaluated_step == progress.step:
            return False
        validation = self.validator.evaluate(self.model)
        epoch = self.dataset.epoch_of_last_batch + 1
        better = progress.add_validation(
            validation.metrics, epoch, metric, metric not in LOWER_IS_BETTER, validation.complete
        )
        self.tracking.log_metrics({f"validation/{k}": v for k, v in validation.metrics.items()}, progress.step)
        values = "  ".join(f"{name} {value:.4f}" for name, value in validation.metrics.items())
        note = "" if validation.complete else f" (stopped after eval_timeout_in_s, {validation.cut_short})"
        self.reporter.milestone(
            f"validation at step {progress.step:,}: {values}{'  (best)' if better else ''}, "
            f"{validation.edges:,} edges in {validation.seconds:.1f} s{note}"
        )
        self.reporter.validation(ValidationRecord(progress.step, validation.metrics, validation.complete))
        self.interval.exclude(validation.seconds)
        return better

    def _tensors(self) -> dict[str, Any]:
        """Return the tensors of a checkpoint; they share the run's memory, so that loading fills them in place."""
        tensors = {"model": self.sharded.state_dict(), "optimizer": self.optimizer.state_dict()["state"]}
        empty_caches(self.sharded)
        return tensors

    def _save(self, wait: bool = False) -> None:
        """Write a checkpoint of this step."""
        self.interval.check_finite()
        cuda = self.ranks.device.type == "cuda"
        random = {
            "cpu": torch.get_rng_state().tolist() if not cuda else None,
            "cuda": torch.cuda.get_rng_state(self.ranks.device).tolist() if cuda else None,
        }
        state = {
            "training_set": self.dataset.version,
            "started_from": [one.as_details() for one in self.started_from],
            "steps_before": self.steps_before,
            "compacted": self.compacted,
            "config": self.config.model_dump(mode="json"),
            "dataset": self.dataset.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": self.progress.state_dict(),
            "interval": self.ranks.gather(self.interval.state_dict()),
            "random": self.ranks.gather(random),
        }
        self.checkpoints.save(self.progress.step, self._tensors(), state, self.progress.best_step, wait)

    def _load_state(self, state: dict[str, Any]) -> None:
        self.started_from = ancestors.origins_in(state)
        self.steps_before = state.get("steps_before", 0)
        self.dataset.load_state_dict(state["dataset"])
        self.progress.load_state_dict(state["progress"])
        self.schedule.load_state_dict(state["schedule"], self._total_steps(self.progress.step))
        # fbgemm's kernels count the steps that Adam's bias correction needs, and no state dict holds that count.
        self.optimizer.set_optimizer_step(self.steps_before + self.progress.step)
        self.interval.load_state_dict(state["interval"])
        if len(state["random"]) == self.ranks.world_size:
            random = state["random"][self.ranks.rank]
            if random["cpu"] is not None:
                torch.set_rng_state(torch.tensor(random["cpu"], dtype=torch.uint8))
            if random["cuda"] is not None and self.ranks.device.type == "cuda":
                torch.cuda.set_rng_state(torch.tensor(random["cuda"], dtype=torch.uint8), self.ranks.device)

    def _parents(self) -> dict[str, str]:
        assets = [f"vocabulary/{name}" for name in self.config.model.table_names]
        assets += ["training_set/positives", "training_set/negatives"]
        optional = ["held_out/validation", "held_out/validation_negatives"]
        assets += [asset for asset in optional if self.store.exists(asset, self.snapshot)]
        self.store.refuse_stale(self.snapshot, assets)
        parents = self.store.versions(self.snapshot, assets)
        if self.store.view is not None:  # a refit takes its epochs from the model that was evaluated
            parents |= self.store.seen_as(None).versions(self.snapshot, ["twhin_model"])
        return parents

    def _ancestor(self) -> dict[str, str]:
        """Return the models of this store that the tables started from, as parents."""
        mine = [one for one in self.started_from if one.version is not None and one.store is None]
        return {f"{self.store.seen_as(one.view).real(ASSET)}@{one.snapshot}": str(one.version) for one in mine}

    def _write_model(self, reason: str) -> dict[str, Any]:
        """Go back to the best step, if the validation set knows one, and write the table `twhin_model`."""
        progress, ranks = self.progress, self.ranks
        carried = self.config.training.carry_optimizer_state
        if progress.best_step is not None and progress.best_step != progress.step:
            tensors = self._tensors()
            self.checkpoints.load(progress.best_step, tensors if carried else {"model": tensors["model"]})
        details = progress.details(self.config, self.dataset.epoch_of_last_batch + 1) | {
            "epochs": self.dataset.epoch,
            "world_size": ranks.world_size,
            "device": ranks.device.type,
            "plan": str(self.sharded.sharding_plan_text),
            "stop_reason": reason,
            **({"started_from": [one.as_details() for one in self.started_from]} if self.started_from else {}),
            **({"recipe": self.recipe.as_details()} if self.recipe else {}),
            **({"tuned": self.config.tune.outcome} if self.config.tune.outcome else {}),
        }
        chosen = f"the model is that of step {details['chosen_step']:,} (epoch {details['chosen_epoch']})"
        if progress.best_value is not None:
            evaluations = len(progress.validations)
            chosen += (
                f": {details['validation_metric']} {progress.best_value:.4f}, the best of {evaluations} evaluation(s)"
            )
        self.reporter.milestone(chosen)
        limit_norms(self.sharded, self.config.model.max_norm)
        warm_start.restore_frozen(
            self.sharded, self.config, self.store, self.snapshot, self.started_from, ranks, self.anchors
        )
        draft = self.store.begin(ASSET, self.snapshot) if ranks.rank == 0 else None
        version = ranks.broadcast(draft.version if draft else None)
        draft = draft or Draft(self.store, ASSET, self.snapshot, version)
        writer = Writer(draft, ranks.rank)
        for table, weight in table_weights(self.sharded).items():
            writer.table(table, local_shards(weight))
        state = OptimizerState(self.sharded, self.optimizer, self.config.model)
        for table, states in state.tables.items() if carried else ():
            writer.states(table, {name: local_shards(value) for name, value in states.items()})
        ranks.barrier()
        if ranks.rank == 0:
            if carried:
                writer.operator_states(self.config.model.relation_names, state.operator_rows())
                details["optimizer"] = state.as_details(self.steps_before + details["chosen_step"])
            for table, rows in self.untrained.items():
                writer.untrained(table, rows)
            writer.relations(self.config.model, unwrapped(self.sharded).scorer.state_rows())
            writer.records("losses", progress.losses, LOSSES_SCHEMA)
            writer.records("metrics", progress.metric_rows(), METRICS_SCHEMA)
            draft.details = details
            draft.commit(
                config_hash=self.config.hash(),
                parents=self.parents | self._ancestor(),
                settings=settings(self.config, "train"),
            )
            keys = ("final_loss", "edges_per_second", "seconds", "best_validation", "chosen_step", "chosen_epoch")
            self.tracking.log_metrics({k: details[k] for k in keys if details[k] is not None}, progress.step)
        ranks.barrier()
        return details
