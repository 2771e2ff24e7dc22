"""Finished runs in use: tokens kept beside stage 1, and samples that depend on seed, class and index alone."""

import dataclasses
import errno
import gc
import json
import shutil

import jax
import numpy as np
import pytest

from vqroi_jax import decoding, train_transformer
from vqroi_jax import tokens as tokens_module
from vqroi_jax.decoding import UNKNOWN
from vqroi_jax.errors import InputError
from vqroi_jax.tokens import encode_cohort, encode_mirrored, find_cohort
from vqroi_jax.trained import (
    Stage1Facts,
    TrainingRois,
    check_finished,
    load_transformer,
    load_vqgan,
    rois_identity,
)
from vqroi_jax.training import partitioning


@pytest.fixture(scope='module')
def trained(tiny_transformer):
    return load_transformer(tiny_transformer)


def sampler(trained, mesh=None, seed=5, **changes):
    sampling = trained.config.sampling.copy_and_resolve_references().unlock()
    sampling.update({'sub_batch': 4, **changes})
    return trained.sampler(sampling, seed, partitioning.make_mesh(mesh or {'data': 1}))


@pytest.fixture(scope='module')
def many(trained):
    """Ten samples of each class, in one go on one device."""
    draw = sampler(trained)
    labels, indices = np.repeat([0, 1], 10), np.tile(np.arange(10), 2)
    return draw, draw.tokens(labels, indices)


def test_samples_are_codes_and_differ(many):
    _, tokens = many
    assert tokens.shape == (20, 64)
    assert tokens.dtype == np.int32
    assert tokens.min() >= 0
    assert tokens.max() < 32
    assert len({row.tobytes() for row in tokens}) == 20


@pytest.mark.parametrize('order', [[3], [9, 0, 5], [2, 12, 1, 11, 19], [7, 3, 11, 15, 19]], ids=str)
def test_a_sample_depends_on_seed_class_and_index_alone(many, order):
    """Whatever is drawn with it, and in which order: rows that fall on the same place included."""
    draw, tokens = many
    labels, indices = np.repeat([0, 1], 10)[order], np.tile(np.arange(10), 2)[order]
    np.testing.assert_array_equal(draw.tokens(labels, indices), tokens[order])


def test_a_sample_does_not_depend_on_the_number_of_devices(trained, many):
    draw, tokens = many
    wide = sampler(trained, {'data': 2, 'fsdp': 2, 'model': 2})
    assert (draw.rows, wide.rows) == (4, 16)
    drawn = wide.tokens(np.repeat([0, 1], 10), np.tile(np.arange(10), 2))
    np.testing.assert_array_equal(drawn, tokens)
    np.testing.assert_array_equal(list(wide.decode(drawn[:3])), list(draw.decode(tokens[:3])))


def test_another_seed_draws_others(trained, many):
    assert (sampler(trained, seed=6).tokens([0], [0]) != many[1][:1]).any()


def test_a_run_samples_with_its_split_parameters_and_keeps_none_of_them_whole(trained, many, monkeypatch):
    traces = []
    arrange = decoding.drawing_params
    monkeypatch.setattr(decoding, 'drawing_params', lambda *arguments: traces.append(1) or arrange(*arguments))
    mesh = {'data': 2, 'fsdp': 2, 'model': 2}
    wide = sampler(trained, mesh)
    traces.clear()
    params = jax.device_put(trained.params, partitioning.state_shardings(trained.params, partitioning.make_mesh(mesh)))
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
    gc.collect()
    before = len(jax.live_arrays())
    for _ in range(2):
        drawn = wide.use(params).tokens(np.repeat([0, 1], 10), np.tile(np.arange(10), 2))
        np.testing.assert_array_equal(drawn, many[1])
        assert len(jax.live_arrays()) == before
    assert traces == [1]


def test_volumes_are_those_of_stage_1s_decoder(trained, many):
    draw, tokens = many
    volumes = list(draw.draw(1, range(5)))
    assert len(volumes) == 5
    grids = tokens[10:15].reshape(5, 4, 4, 4)
    vqgan = trained.vqgan
    expected = np.asarray(vqgan.model.apply(vqgan.variables, grids, method='decode_samples'))[..., 0]
    np.testing.assert_allclose(volumes, expected, atol=1e-5)


def test_given_tokens_stay(trained, many):
    draw, _ = many
    given = np.full((2, 64), UNKNOWN)
    given[:, :40] = 7
    drawn = draw.tokens([0, 1], [0, 0], given)
    assert (drawn[:, :40] == 7).all()
    assert (drawn[:, 40:] != 7).any()


@pytest.mark.parametrize('label', [-1, 2])
def test_a_label_outside_the_classes_is_refused(many, label):
    with pytest.raises(InputError, match='the model knows classes 0 to 1'):
        many[0].tokens([0, label], [0, 1])


def test_nothing_asked_nothing_drawn(many):
    assert many[0].tokens([], []).shape == (0, 64)
    assert list(many[0].draw(0, [])) == []


def test_tokens_and_scores_are_those_of_the_encoder(tiny_vqgan):
    vqgan = load_vqgan(tiny_vqgan)
    cohort = find_cohort(vqgan, '')
    sources = encode_cohort(vqgan, cohort, partitioning.make_mesh({'data': 3}))
    assert {name: len(source) for name, source in sources.items()} == {'train': 6, 'val': 2, 'test': 2}
    rois, source = cohort.split('train'), sources['train']
    volumes = np.stack([rois.volume(i) for i in range(6)])
    expected = np.asarray(vqgan.model.apply(vqgan.variables, volumes, method='index_quantize')).reshape(6, -1)
    assert np.mean(source.tokens == expected) > 0.99  # rounding may decide between two codes
    scores = np.asarray(vqgan.model.apply(vqgan.variables, volumes, method='importance')).reshape(6, -1)
    np.testing.assert_allclose(source.scores, scores, atol=1e-5)
    batch = source.load(np.array([4, 1]))
    np.testing.assert_array_equal(batch['tokens'], source.tokens[[4, 1]])
    np.testing.assert_array_equal(batch['label'], rois.labels[[4, 1]])
    assert batch['index'].tolist() == [4, 1]


def test_tokens_are_encoded_once_for_each_checkpoint(tiny_vqgan, monkeypatch):
    vqgan = load_vqgan(tiny_vqgan)
    cohort, mesh = find_cohort(vqgan, ''), partitioning.make_mesh({'data': 1})
    first = encode_cohort(vqgan, cohort, mesh)

    def again(*unused):
        raise RuntimeError('encoded again')

    monkeypatch.setattr(tokens_module, '_encode', again)
    second = encode_cohort(vqgan, cohort, mesh)
    np.testing.assert_array_equal(second['val'].tokens, first['val'].tokens)
    other_voxels = dataclasses.replace(cohort, report=cohort.report | {'key': 'f' * 64})
    for stage1, rois in (
        (dataclasses.replace(vqgan, identity='f' * 16), cohort),
        (dataclasses.replace(vqgan, step=vqgan.step + 1), cohort),
        (vqgan, other_voxels),
    ):
        with pytest.raises(RuntimeError, match='encoded again'):
            encode_cohort(stage1, rois, mesh)


@pytest.mark.parametrize('content', [b'', b'PK torn'], ids=['empty', 'torn'])
def test_tokens_in_a_damaged_file_are_made_anew(tiny_vqgan, tmp_path, content):
    vqgan, mesh = load_vqgan(shutil.copytree(tiny_vqgan, tmp_path / 'stage1')), partitioning.make_mesh({'data': 1})
    cohort = find_cohort(vqgan, '')
    expected = encode_cohort(vqgan, cohort, mesh)
    (path,) = (vqgan.workdir / 'tokens').glob(f'step_{vqgan.step}_{vqgan.identity}_{cohort.report["key"][:16]}.npz')
    path.write_bytes(content)
    np.testing.assert_array_equal(encode_cohort(vqgan, cohort, mesh)['train'].tokens, expected['train'].tokens)
    with np.load(path) as stored:
        np.testing.assert_array_equal(stored['train_tokens'], expected['train'].tokens)


def test_tokens_that_cannot_be_kept_are_used_with_a_warning(tiny_vqgan, tmp_path, monkeypatch, capsys):
    def fail(*unused):
        raise OSError(errno.EROFS, 'Read-only file system')

    vqgan, mesh = load_vqgan(shutil.copytree(tiny_vqgan, tmp_path / 'stage1')), partitioning.make_mesh({'data': 1})
    shutil.rmtree(vqgan.workdir / 'tokens', ignore_errors=True)
    monkeypatch.setattr(tokens_module, 'write_atomically', fail)
    assert len(encode_cohort(vqgan, find_cohort(vqgan, ''), mesh)['train']) == 6
    assert 'cannot be written (Read-only file system): the next run will encode' in capsys.readouterr().out


def test_views_are_encoded_mirrored_along_every_choice_of_axes(tiny_vqgan, monkeypatch):
    vqgan = load_vqgan(tiny_vqgan)
    cohort = find_cohort(vqgan, '')
    source = encode_mirrored(vqgan, cohort, ('width', 'depth'), partitioning.make_mesh({'data': 3}))
    rois = cohort.split('train')
    assert source.ids == rois.ids
    volumes = np.stack([rois.volume(i) for i in range(6)])
    for view, turned in enumerate((volumes, volumes[:, ::-1], volumes[..., ::-1, :], volumes[:, ::-1, :, ::-1])):
        expected = np.asarray(vqgan.model.apply(vqgan.variables, turned, method='index_quantize')).reshape(6, -1)
        assert np.mean(source.tokens[:, view] == expected) > 0.99, view  # rounding may decide between two codes
        scores = np.asarray(vqgan.model.apply(vqgan.variables, turned, method='importance')).reshape(6, -1)
        np.testing.assert_allclose(source.scores[:, view], scores, atol=1e-5)
    assert (source.tokens[:, 1] != source.tokens[:, 0]).any()
    assert source.load(np.array([4, 1]))['tokens'].shape == (2, 4, source.tokens.shape[2])

    monkeypatch.setattr(tokens_module, '_encode', None)  # from the file, whatever the order of the axes
    again = encode_mirrored(vqgan, cohort, ('depth', 'width'), partitioning.make_mesh({'data': 1}))
    np.testing.assert_array_equal(again.tokens, source.tokens)


def test_identity_follows_the_weights(tiny_vqgan):
    vqgan = load_vqgan(tiny_vqgan)
    assert len(vqgan.identity) == 16
    assert load_vqgan(str(tiny_vqgan)).identity == vqgan.identity
    params = jax.tree.map(np.copy, vqgan.variables['params'])
    params['decoder']['last']['bias'] += 1e-6
    from vqroi_jax.trained import _identity

    assert _identity(params, vqgan.variables['codebook']['codebook']['codes']) != vqgan.identity


def test_a_transformer_wants_the_stage_1_that_it_was_trained_on(tiny_transformer, tmp_path):
    for name in ('config.json', 'checkpoints'):
        (tmp_path / name).symlink_to(tiny_transformer / name)
    facts = json.loads((tiny_transformer / 'stage1.json').read_text())
    (tmp_path / 'stage1.json').write_text(json.dumps({**facts, 'identity': '0' * 16}))
    with pytest.raises(InputError, match=r'is not the stage 1 that .* was trained on: the weights of step 4 differ'):
        load_transformer(tmp_path)
    (tmp_path / 'stage1.json').write_text('{')
    with pytest.raises(InputError, match=r'stage1.json is damaged'):
        load_transformer(tmp_path)
    (tmp_path / 'stage1.json').unlink()
    with pytest.raises(InputError, match=r'was never started as a run of stage 2: .*stage1.json is missing'):
        load_transformer(tmp_path)


def test_runs_say_from_whom_they_have_learnt(trained, tiny_vqgan, tmp_path):
    """Beside what the cohort itself says; a run without the record, as those that were converted, is not known."""
    scans = json.loads((tiny_vqgan / 'cohort' / 'cohort.json').read_text())['scans']
    for name in ('train', 'val'):
        expected = {scan['patient'] for scan in scans if scan['split'] == name}
        assert getattr(trained.learnt_from, name) == expected
        assert expected
    stage1 = dataclasses.replace(trained.vqgan, workdir=tmp_path)
    assert dataclasses.replace(trained, workdir=tmp_path).learnt_from is None
    assert dataclasses.replace(trained, vqgan=stage1).learnt_from is None


def test_epochs_of_stage_1_are_those_of_its_own_rois(tiny_vqgan, tmp_path):
    vqgan = load_vqgan(tiny_vqgan)
    config = vqgan.config.copy_and_resolve_references().unlock()
    config.training.duration = '1.3333 epochs'  # of 6 ROIs, 2 a step: the 4 steps that were made
    vqgan = dataclasses.replace(vqgan, config=config)
    assert train_transformer.stage1_rois(vqgan) == 6
    check_finished(vqgan, 'latest', 6)
    with pytest.raises(InputError, match=r'unfinished \(step 4 of 6\)'):
        check_finished(vqgan, 'latest', 9)
    with pytest.raises(
        InputError, match=r'for 1.3333 epochs, and how many ROIs .* not known: if step 4 is its end, take'
    ):
        check_finished(vqgan, 'best', None)
    check_finished(vqgan, '4', None)

    (tmp_path / 'cohort').symlink_to(tiny_vqgan / 'cohort')
    older = dataclasses.replace(vqgan, workdir=tmp_path)  # of before it was recorded
    assert train_transformer.stage1_rois(older) == 6
    (tmp_path / 'cohort').unlink()
    assert train_transformer.stage1_rois(older) is None
    (tmp_path / 'training_rois.json').write_text('{"number": 9, "identity": ""}')
    assert train_transformer.stage1_rois(older) == 9


def test_a_run_goes_on_with_the_rois_that_it_began_with(tmp_path):
    scan = {
        'id': 'a',
        'patient': 'A',
        'label': 'LGG',
        'split': 'train',
        'range': [0.0, 1.0],
        'sha256': '00',
        'image': '/x',
    }
    rois = TrainingRois.of_scans([scan, {**scan, 'id': 'b', 'split': 'val'}])
    assert rois.number == 1
    rois.record(tmp_path, begun=True)  # of before there was the file: nothing is known
    assert TrainingRois.read(tmp_path) is None
    TrainingRois.of_scans([scan]).record(tmp_path, begun=False)
    rois.record(tmp_path, begun=False)  # nothing was learnt of the others
    assert TrainingRois.read(tmp_path) == rois
    moved = {**scan, 'image': '/y'}
    TrainingRois.of_scans([{**scan, 'id': 'b', 'split': 'val'}, moved]).record(tmp_path, begun=True)
    for change in ({'sha256': '01'}, {'split': 'test'}, {'label': 'HGG'}):
        with pytest.raises(InputError, match='was started with other ROIs'):
            TrainingRois.of_scans([{**scan, **change}, {**scan, 'id': 'b', 'split': 'val'}]).record(
                tmp_path, begun=True
            )
    (tmp_path / 'training_rois.json').write_text('[]')
    with pytest.raises(InputError, match=r'training_rois.json is damaged'):
        TrainingRois.read(tmp_path)


def test_stage_2_does_not_go_on_with_other_rois(tiny_transformer, tiny_vqgan, tmp_path):
    facts = Stage1Facts.read(tiny_transformer)
    scans = json.loads((tiny_vqgan / 'cohort' / 'cohort.json').read_text())['scans']
    assert facts.rois == rois_identity(scans) == rois_identity(scans[::-1]) != rois_identity(scans[1:])
    dataclasses.replace(facts, rois='other').record(tmp_path, begun=False)
    facts.record(tmp_path, begun=False)  # nothing was learnt of the others
    with pytest.raises(InputError, match=rf'another stage 1 or cohort \(rois {facts.rois} then, other now\)'):
        dataclasses.replace(facts, rois='other').record(tmp_path, begun=True)
    plain = json.loads((tmp_path / 'stage1.json').read_text())
    del plain['rois']  # a run of before they were recorded
    (tmp_path / 'stage1.json').write_text(json.dumps(plain))
    facts.record(tmp_path, begun=True)
    assert Stage1Facts.read(tmp_path).rois == ''


def test_the_facts_of_a_stage_1_that_was_moved_say_where_it_is(trained, tmp_path):
    before = dataclasses.replace(trained.facts, rois='')  # as runs of before these were known
    before.record(tmp_path, begun=False)
    assert Stage1Facts.read(tmp_path) == before
    dataclasses.replace(trained.facts, workdir='/elsewhere').record(tmp_path, begun=True)
    assert Stage1Facts.read(tmp_path) == dataclasses.replace(before, workdir='/elsewhere')
