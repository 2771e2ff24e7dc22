"""Files of the authors' code, read into runs: our networks give what the oracle gives with the files' own tensors.

The oracle's names for the authors' tensors are written out here, apart from `vqroi_jax.release`.
"""

import pathlib
import runpy

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason="PyTorch is not installed: pip install -e '.[parity]'")

from oracle import release_files, torch_transformer, torch_vqgan  # noqa: E402
from oracle.comparison import assert_near, channels_first, channels_last  # noqa: E402

from vqroi_jax import convert, main  # noqa: E402
from vqroi_jax.errors import InputError  # noqa: E402
from vqroi_jax.trained import load_transformer, load_vqgan  # noqa: E402

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'convert.py'
GRID, BATCH, HEADS, LAYERS = (2, 2, 2), 2, 4, 2
STAGE2 = release_files.stage2(GRID, LAYERS)


def as_tensors(contents):
    if isinstance(contents, dict):
        return {name: as_tensors(value) for name, value in contents.items()}
    return torch.tensor(contents) if isinstance(contents, np.ndarray) else contents


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of stage 2 from a file that PyTorch has saved."""
    folder = tmp_path_factory.mktemp('convert')
    torch.save(as_tensors(STAGE2), folder / 'epoch_4999.pt')
    convert.run(reading(folder / 'epoch_4999.pt'), folder / 'run')
    return folder / 'run'


def reading(file):
    config = runpy.run_path(str(CONFIG))['get_config']()
    config.release, config.classes, config.transformer.model.heads = str(file), ('a', 'b', 'c'), HEADS
    return config.lock()


@pytest.fixture(scope='module')
def vqgan_oracle():
    sizes = torch_vqgan.Sizes(
        volume=32,
        channels=(8, 16, 24, 32),
        hidden=40,
        code_dim=release_files.FEATURES,
        num_codes=release_files.CODES,
        classifier_hidden=release_files.HIDDEN,
        classes=release_files.CLASSES,
    )
    names = {
        'pre_quantisation': 'prev_conv.conv',
        'post_quantisation': 'postV_conv.conv',
        'decoder.20': 'vqgan_decoder.final_conv',
        'scorer.0': 'score_net.score_pred_net.1',
        'scorer.2': 'score_net.score_pred_net.3',
        'scorer.3': 'score_net.score_pred_net.4.gn',
        'classifier.0': 'score_net.classifier.0',
        'classifier.1': 'score_net.classifier.1.gn',
        'classifier.4': 'score_net.classifier.4',
    }
    for stage in range(5):
        names[f'encoder.{4 * stage}'] = f'vqgan_encoder.conv{stage + 1}.conv.0'
        names[f'encoder.{4 * stage + 1}'] = f'vqgan_encoder.conv{stage + 1}.conv.1.gn'
        names |= res_block(f'encoder.{4 * stage + 3}', f'vqgan_encoder.res_block{stage + 1}')
    for stage in range(4):
        names[f'decoder.{5 * stage + 1}'] = f'vqgan_decoder.upsize{4 - stage}.up.1'
        names[f'decoder.{5 * stage + 2}'] = f'vqgan_decoder.upsize{4 - stage}.up.2.gn'
        names |= res_block(f'decoder.{5 * stage + 4}', f'vqgan_decoder.res_block{4 - stage}')
    state = {'codebook.codes': 'codebook.embedding.weight', 'codebook.usage': 'codebook.cluster_size'}
    state |= {f'{ours}.{end}': f'{theirs}.{end}' for ours, theirs in names.items() for end in ('weight', 'bias')}
    oracle = torch_vqgan.VQGAN(sizes).double()
    oracle.load_state_dict({ours: torch.tensor(STAGE2[theirs]) for ours, theirs in state.items()})
    return oracle.eval()


def res_block(ours, theirs):
    return {
        f'{ours}.conv1': f'{theirs}.conv_module.0',
        f'{ours}.norm': f'{theirs}.conv_module.1.gn',
        f'{ours}.conv2': f'{theirs}.conv_module.3',
    }


def test_stage_1_gives_the_same(run, vqgan_oracle):
    vqgan, oracle = load_vqgan(run / 'vqgan'), vqgan_oracle
    volume = np.random.default_rng(3).uniform(-1, 1, (BATCH, 32, 32, 32, 1)).astype(np.float32)
    trunk = vqgan.model.apply(vqgan.variables, volume, jnp.asarray(True), method='trunk')
    with torch.no_grad():
        latent = oracle.pre_quantisation(oracle.encoder(channels_first(volume)))
        scores = oracle.scorer(latent)
        _, codes, _, tokens = oracle.codebook(latent)
        logits = oracle.classifier(latent, scores)
        decoded = oracle.decoder(oracle.post_quantisation(codes))
    np.testing.assert_array_equal(trunk.tokens, tokens.numpy())
    assert len(np.unique(tokens)) > 3
    ours = vqgan.model.apply(vqgan.variables, volume, method='encode')
    assert_near(ours, channels_last(latent), 'latent')
    assert_near(trunk.scores[..., None], channels_last(scores), 'scores')
    assert_near(trunk.logits, logits, 'logits')
    volumes = vqgan.decode(vqgan.variables, np.reshape(trunk.tokens, (BATCH, -1)))
    assert_near(volumes[..., None], channels_last(decoded), 'volumes')


def test_stage_2_gives_the_same(run):
    trained, length = load_transformer(run), 8
    oracle = torch_transformer.GPT(
        torch_transformer.Sizes(release_files.CODES, release_files.CLASSES, length, LAYERS, release_files.WIDTH, HEADS)
    ).double()
    names = {'tokens': 'tok_emb', 'norm': 'ln_f', 'head': 'head'}
    for layer in range(LAYERS):
        parts = {'norm_1': 'ln1', 'norm_2': 'ln2', 'attention.projection': 'attn.proj', 'mlp.0': 'mlp.0'}
        parts |= {'mlp.2': 'mlp.2'} | {f'attention.{name}': f'attn.{name}' for name in ('query', 'key', 'value')}
        names |= {f'blocks.{layer}.{ours}': f'blocks.{layer}.{theirs}' for ours, theirs in parts.items()}
    state = {'positions': torch.tensor(STAGE2['transformer.pos_emb'][0, :length])}
    for ours, theirs in names.items():
        for end in ('weight', 'bias'):
            if f'transformer.{theirs}.{end}' in STAGE2:
                state[f'{ours}.{end}'] = torch.tensor(STAGE2[f'transformer.{theirs}.{end}'])
    oracle.load_state_dict(state)
    ids = np.random.default_rng(4).integers(release_files.CODES + 4, size=(BATCH, length)).astype(np.int32)
    with torch.no_grad():
        logits = oracle(torch.tensor(ids).long())
    assert_near(trained.model.apply({'params': trained.params}, ids), logits, 'logits')


def assert_same(ours, theirs):
    """Contents of two files, to the bit."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_same(ours[name], value)
    elif torch.is_tensor(theirs):
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous()
        assert ours.shape == theirs.shape
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()
    else:
        assert ours == theirs


def test_files_come_back_to_the_bit(run, tmp_path):
    config = runpy.run_path(str(CONFIG))['get_config']()
    config.run = str(run)
    convert.run(config, tmp_path / 'out')
    back = torch.load(tmp_path / 'out' / 'transformer.pth', weights_only=True)
    assert_same(back, as_tensors(STAGE2))

    stage1 = as_tensors(release_files.stage1_file(release_files.stage1(GRID)))
    torch.save(stage1, tmp_path / 'epoch_7999.pt')
    convert.run(reading(tmp_path / 'epoch_7999.pt'), tmp_path / 'run1')
    config.run = str(tmp_path / 'run1')
    convert.run(config, tmp_path / 'out1')
    assert_same(torch.load(tmp_path / 'out1' / 'vqgan.pth', weights_only=True), stage1)


class Unsafe:
    def __reduce__(self):
        return print, ('a file must not run code',)


def test_files_that_run_code_or_hold_another_network(tmp_path, capsys):
    torch.save({'Encoder': Unsafe()}, tmp_path / 'unsafe.pt')
    with pytest.raises(InputError, match=r'unsafe.pt is not a file of tensors that PyTorch has saved'):
        convert.run(reading(tmp_path / 'unsafe.pt'), tmp_path / 'run')
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / 'linear.pt')
    command = ['main', f'--config={CONFIG}', f'--config.release={tmp_path / "linear.pt"}']
    assert main.main([*command, f'--workdir={tmp_path / "run"}']) == 2
    out, err = capsys.readouterr()
    assert "linear.pt is no file of the authors' code: neither the networks Encoder" in err
    assert 'a file must not run code' not in out
    assert not (tmp_path / 'run').exists()
