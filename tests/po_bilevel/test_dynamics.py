"""Transitions from MuJoCo and Minari, models of them, and planning with a model."""

import json
import os

import gymnasium
import minari
import numpy as np
import pytest
import torch
from po_bilevel import UsageError, cli
from po_bilevel.experiments import dynamics, planner, runs, transitions
from po_bilevel.experiments.dynamics import DynamicsConfig
from po_bilevel.experiments.runs import Clock, Outcome

SMALL = {
    "transitions": 300, "horizon": 30, "seeds": 1, "steps": 40, "outer_steps": 2, "inner_steps": 5, "hidden": (16,),
    "progress": False,
}  # fmt: skip


def test_random_transitions_of_mujoco():
    found = transitions.collect("HalfCheetah-v5", 100, horizon=40, behaviour="random", noise=0.0, seed=1)
    assert found.observations.shape == found.following.shape == (100, 17)
    assert found.actions.shape == (100, 6)
    assert np.abs(found.actions).max() <= 1.0
    np.testing.assert_array_equal(np.bincount(found.episodes), [40, 40, 20])
    inside = found.episodes[:-1] == found.episodes[1:]
    np.testing.assert_array_equal(found.following[:-1][inside], found.observations[1:][inside])
    again = transitions.collect("HalfCheetah-v5", 100, horizon=40, behaviour="random", noise=0.0, seed=1)
    np.testing.assert_array_equal(again.following, found.following)
    assert not os.path.exists("MUJOCO_LOG.TXT")


def test_noise_around_a_controller(tmp_path):
    path = tmp_path / "controller.npz"
    np.savez(path, weight=np.array([[0.0, -1.0, 0.0, -0.3]]), bias=np.zeros(1))
    controller = transitions.load_controller(path)
    options = {"horizon": 50, "behaviour": "controller", "seed": 0, "controller": controller}
    exact = transitions.collect("InvertedPendulum-v5", 50, noise=0.0, **options)
    # Actions go from -3 to 3.
    np.testing.assert_allclose(
        exact.actions[:, 0], 3.0 * np.clip(exact.observations @ controller.weight[0], -1, 1), atol=1e-6
    )
    noisy = transitions.collect("InvertedPendulum-v5", 400, noise=0.1, **options)
    asked = noisy.observations @ controller.weight[0]
    error = noisy.actions[:, 0] - 3.0 * asked
    # Where no bound is near the noise is 0.1 times 3. Its standard deviation is right to 1/√2n: four of that.
    inside = error[np.abs(asked) < 0.6]
    assert len(inside) > 50
    assert np.std(inside) == pytest.approx(0.3, rel=4.0 / np.sqrt(2 * len(inside)))
    with pytest.raises(UsageError, match=r"--controller: expected a weight of shape \(1, 3\)"):
        transitions.collect("Pendulum-v1", 5, noise=0.1, **options)


def test_a_trained_controller_is_better_than_none():
    with transitions.environment("InvertedPendulum-v5") as env:
        trained = transitions.train_controller(env, horizon=100, seed=0, rounds=5, candidates=16)

        def length(controller):
            """Steps before the pendulum falls, at most 100."""
            observation, _ = env.reset(seed=0)
            for step in range(100):
                observation, _, terminated, _, _ = env.step(3.0 * controller(observation))
                if terminated:
                    return step
            return 100

        assert length(trained) > 1.3 * length(transitions.Controller(np.zeros((1, 4)), np.zeros(1)))


# Minari's collector leaves its temporary folder to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_minari(tmp_path, monkeypatch):
    """Written by Minari's own collector and read back."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    environment = minari.DataCollector(gymnasium.make("Pendulum-v1", max_episode_steps=20), record_infos=False)
    for seed in range(4):
        environment.reset(seed=seed)
        environment.action_space.seed(seed)
        done = False
        while not done:
            *_, terminated, truncated, _ = environment.step(environment.action_space.sample())
            done = terminated or truncated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        written = environment.create_dataset("pendulum/random-v0", algorithm_name="random")
    environment.close()
    found = transitions.load_minari("pendulum/random-v0")
    assert found.observations.shape == (80, 3)
    assert found.actions.shape == (80, 1)
    first = written[0]
    np.testing.assert_allclose(found.observations[:20], first.observations[:20])
    np.testing.assert_allclose(found.following[19], first.observations[20])
    assert len(transitions.load_minari("pendulum/random-v0", 30).actions) == 30
    outcome = dynamics.run(DynamicsConfig(minari="pendulum/random-v0", methods=("mse", "nll"), **SMALL))
    assert [row["dataset"] for row in outcome.rows] == ["pendulum/random-v0"] * 2


def test_every_method_through_the_command_line(tmp_path, capsys):
    options = ["--seeds", "1", "--transitions", "400", "--horizon", "40", "--steps", "30", "--outer-steps", "2"]
    options += ["--inner-steps", "5", "--env", "Reacher-v5", "--plan-episodes", "1", "--plan-steps", "2"]
    assert cli.main(["dynamics", "--out", str(tmp_path), *options]) == 0
    printed = capsys.readouterr()
    # Where the target is does not change, and the last but two dimensions are relative to it.
    assert "dimensions 4, 5 of s' - s do not change and were dropped" in printed.err
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["method"] for row in found] == list(dynamics.METHODS)
    metrics = ("rmse", "nll_per_dim", "coverage_50", "coverage_90", "rmse_1", "rmse_5", "rmse_20", "return")
    assert all(np.isfinite(row[metric]) for row in found for metric in metrics)
    # An episode of 40 steps has no error after 50.
    assert all(row["rmse_50"] is None for row in found)
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert np.array(curves["per_dimension"]["nll"][0]["rmse"]).shape == (8,)
    assert (tmp_path / "dynamics.png").read_bytes().startswith(b"\x89PNG")


def linear_problem():
    """Transitions of s' = s + a + noise of standard deviation 0.1 and 0.5."""
    random = np.random.default_rng(0)
    before, actions = random.normal(size=(3000, 2)), random.normal(size=(3000, 2))
    following = before + actions + random.normal(size=(3000, 2)) * np.array([0.1, 0.5])
    return transitions.Transitions("linear", before, actions, following, np.repeat(np.arange(30), 100))


@pytest.mark.parametrize("method", ["mse", "beta_nll", "pg_learned_diagonal"])
def test_models_find_mean_and_noise(monkeypatch, method):
    monkeypatch.setattr(transitions, "collect", lambda *_, **__: linear_problem())
    config = DynamicsConfig(
        methods=(method,), seeds=1, steps=1000, hidden=(16,), outer_steps=20, inner_steps=10, progress=False
    )
    outcome = dynamics.run(config)
    (row,) = outcome.rows
    std = np.array([0.1, 0.5]) / np.sqrt(1 + np.array([0.1, 0.5]) ** 2)
    # On 600 rows of two outputs, five standard errors and what 1000 steps on 2400 rows miss: of a Gaussian's entropy,
    # 0.02 nats each; of a coverage, 0.009; of a standard deviation, 1/√1200 of it.
    assert row["nll_per_dim"] == pytest.approx(np.log(std).mean() + 0.5 * np.log(2 * np.pi * np.e), abs=0.1)
    assert row["coverage_90"] == pytest.approx(0.9, abs=0.05)
    rmse = outcome.curves["per_dimension"][method][0]["rmse"]
    np.testing.assert_allclose(rmse, std, rtol=0.15)


def test_open_loop_error_of_a_perfect_model(monkeypatch):
    monkeypatch.setattr(transitions, "collect", lambda *_, **__: linear_problem())
    problem = dynamics._Problem(DynamicsConfig(progress=False), linear_problem(), 0)
    monkeypatch.setattr(problem, "_step", lambda policy, s, a: s + a)
    found = problem._open_loop(problem._policy("nll"))
    # Here each state is drawn anew, so that only one step is predictable. 200 starts, the noise of one output almost
    # alone: its standard deviation is right to 1/√400, three of which are 15%.
    assert found["rmse_1"] == pytest.approx(np.sqrt((0.1**2 + 0.5**2) / 2), rel=0.15)


def test_the_parts_have_no_episode_in_common():
    episodes = np.repeat(np.arange(10), 7)
    parts = dynamics._split(episodes, 0.2, 0.25, 3)
    names = [set(episodes[part]) for part in parts]
    assert [len(part) for part in names] == [6, 2, 2]
    assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
    with pytest.raises(UsageError, match="at least three episodes"):
        dynamics._split(np.zeros(5), 0.2, 0.25, 0)


@pytest.mark.parametrize("name", ["Pendulum-v1", "Reacher-v5"])
def test_rewards_of_the_planner_are_those_of_the_environment(name):
    with transitions.environment(name) as env:
        observation, _ = env.reset(seed=0)
        env.action_space.seed(0)
        for _ in range(30):
            action = env.action_space.sample()
            following, reward, *_ = env.step(action)
            ours = planner.REWARDS[name](*(torch.tensor(x[None], dtype=torch.float64)
                                           for x in (observation, action, following)))  # fmt: skip
            # Pendulum's observations are float32.
            assert float(ours) == pytest.approx(float(reward), rel=1e-4, abs=1e-5)
            observation = following


def test_a_learned_reward_is_the_closed_form_of_the_held_out_residuals():
    """Also of outputs whose noise differs a hundredfold and that are fitted far better than they are predicted."""
    random = np.random.default_rng(0)
    observations = random.standard_normal((900, 3))
    noise = random.standard_normal((900, 3)) * [1.0, 0.1, 0.01]
    data = transitions.Transitions(
        "toy", observations, random.standard_normal((900, 1)), observations + np.sin(3.0 * observations) + noise,
        np.arange(900) // 30,
    )  # fmt: skip
    problem = dynamics._Problem(DynamicsConfig(steps=300, hidden=(32,), progress=False), data, 0)
    outcome = Outcome([], {}, [])
    for kind in ("isotropic", "diagonal", "full"):
        learned, residual = (
            problem._precision(method, outcome, Clock()) for method in (f"pg_learned_{kind}", f"pg_{kind}_residual")
        )
        torch.testing.assert_close(learned, residual, rtol=0.01, atol=1e-3)
    assert outcome.warnings == []


def test_planning_with_the_truth():
    """A point that an action moves: the plan goes to zero and stays."""
    bounds = (-torch.ones(1), torch.ones(1))
    generator = torch.Generator().manual_seed(0)
    actions = planner.plan(
        lambda s, a: s + a, lambda s, *_: -s.square().sum(dim=1), torch.tensor([1.5]), torch.zeros(4, 1), bounds,
        generator, population=256, elites=16, rounds=8,
    )  # fmt: skip
    state = 1.5 + actions.cumsum(dim=0)[:, 0]
    assert float(state[1].abs()) < 0.2
    assert float(state[2].abs()) < 0.2


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--env", "Cheetah-v0"], ["--env", "'Cheetah-v0'"]),
        (["--env", "CartPole-v1"], ["--env", "vectors"]),
        (["--transitions", "0"], ["--transitions", "at least 1"]),
        (["--test-fraction", "2"], ["--test-fraction", "between 0 and 1"]),
        (["--plan-episodes", "1"], ["--plan-episodes", "Pendulum-v1", "HalfCheetah-v5"]),
        (["--controller", "none.npz"], ["--controller", "none.npz"]),
        (["--transitions", "20"], ["at least three episodes"]),
    ],
)
def test_bad_options(tmp_path, capsys, options, parts):
    assert cli.main(["dynamics", "--seeds", "1", "--no-plot", "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts)
    assert "Traceback" not in error


def test_a_data_set_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("minari.load_dataset", refuse)
    with pytest.raises(UsageError, match=r"--minari: .*'none/of-that-name-v0'.*no network"):
        transitions.load_minari("none/of-that-name-v0")


def test_seconds_do_not_depend_on_the_order_of_methods(monkeypatch):
    """A clock that ticks once for each step of training: shared work is charged to each method that needs it."""
    ticks = [0.0]

    def counted(function):
        def run(*arguments, **options):
            _, steps = function(*arguments, **options)
            ticks[0] += steps
            return _, steps

        return run

    for name in ("train", "train_policy_gradient"):
        monkeypatch.setattr(dynamics, name, counted(getattr(dynamics, name)))
    monkeypatch.setattr(runs.time, "perf_counter", lambda: ticks[0])
    monkeypatch.setattr(transitions, "collect", lambda *_, **__: linear_problem())
    methods = ("mse", "pg_diagonal_marginal", "pg_diagonal_residual", "pg_learned_isotropic")
    options = SMALL | {"outer_steps": 1, "steps": 7}
    for order in (methods, methods[::-1]):
        outcome = dynamics.run(DynamicsConfig(methods=order, **options))
        seconds = {row["method"]: row["seconds"] for row in outcome.rows}
        # One training, and the regression whose residuals the last two are computed from.
        assert seconds == dict(zip(methods, (7.0, 7.0, 14.0, 14.0), strict=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_a_number_that_is_not_finite_is_no_constant_dimension(bad, tmp_path, monkeypatch):
    """In what is read, from wherever; 1e39 is infinite in float32."""

    class Broken(gymnasium.Wrapper):
        def step(self, action):
            observation, *rest = self.env.step(action)
            return np.append(observation.astype(np.float64)[:2], bad), *rest

    made = gymnasium.make
    monkeypatch.setattr("gymnasium.make", lambda name: Broken(made(name)))
    with pytest.raises(UsageError, match=r"--env: observations of Pendulum-v1: .* in row 1, column 2"):
        transitions.collect("Pendulum-v1", 30, horizon=10, behaviour="random", noise=0.0, seed=0)
    episodes = [
        minari.data_collector.EpisodeBuffer(
            id=0, observations=np.zeros((4, 2)), actions=np.array([[0.0], [1.0], [bad]]), rewards=[0.0] * 3,
            terminations=[False] * 3, truncations=[False] * 3,
        )
    ]  # fmt: skip
    dataset = type("Dataset", (), {"iterate_episodes": lambda self: episodes})
    monkeypatch.setattr("minari.load_dataset", lambda name, download: dataset())
    with pytest.raises(UsageError, match=r"--minari: actions of any/set-v0: .* in row 2, column 0"):
        transitions.load_minari("any/set-v0")
    np.savez(tmp_path / "controller.npz", weight=np.array([[0.0, bad]]), bias=np.zeros(1))
    with pytest.raises(UsageError, match=r"--controller: weight of .* in row 0, column 1"):
        transitions.load_controller(tmp_path / "controller.npz")


def test_files_that_are_no_controller(tmp_path):
    path = tmp_path / "controller.npz"
    np.savez(path, weight=np.zeros((1, 2)), bias=np.zeros(3))
    with pytest.raises(UsageError, match=r"--controller: expected a weight \(A, O\) and a bias \(A,\)"):
        transitions.load_controller(path)
    for content in (b"", path.read_bytes()[:100], b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"--controller: expected an \.npz file"):
            transitions.load_controller(path)
