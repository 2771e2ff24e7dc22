"""Names, shapes and layouts of the authors' tensors: all of those listed at full size, and both ways bit by bit."""

import jax
import numpy as np
import pytest
from oracle import release_files

from vqroi_jax import release
from vqroi_jax.errors import InputError
from vqroi_jax.models.transformer import Transformer
from vqroi_jax.models.vqgan import VQGAN

GRID = (1, 2, 3)
KEY = jax.random.key(0)


def abstract(shapes):
    return {name: jax.ShapeDtypeStruct(tuple(shape), np.float32) for name, shape in shapes.items()}


def vqgan_shapes(model, roi_size):
    shapes = jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, *roi_size, 1), np.float32))
    return {'params': shapes['params'], 'codebook': shapes['codebook']['codebook']}


def test_all_listed_tensors_of_stage_1_are_covered_at_full_size():
    listed = abstract(release_files.LISTED['stage1'])
    sizes = release.VQGANSizes.read('listed', listed)
    assert sizes == release.VQGANSizes(
        (32, 64, 128, 256), 512, 1024, 128, (1, 1, 1, 1), (1, 1, 1, 1), 1024, classes=2, regions=512
    )
    ours = release.shapes(sizes.places(), vqgan_shapes(VQGAN(classes=2), (128, 128, 128)))
    unused = {name: tensor.shape for name, tensor in sizes.unused().items()}
    assert not ours.keys() & unused.keys()
    assert ours | unused == {name: leaf.shape for name, leaf in listed.items()}
    named = release.rename(listed, release.NETWORKS)
    assert named.keys() == release_files.as_in_stage2(listed).keys()


def test_all_listed_tensors_of_stage_2_are_covered_at_full_size():
    listed = abstract(release_files.listed_stage2())
    sizes = release.TransformerSizes.read('listed', listed)
    assert sizes == release.TransformerSizes(24, 1024, vocabulary=1027, classes=2, positions=1024)
    model = Transformer(1027, 1024)
    shapes = jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, 1024), np.int32))
    ours = release.shapes(sizes.places(), shapes)
    unused = {name: tensor.shape for name, tensor in sizes.unused().items()}
    assert not ours.keys() & unused.keys()
    assert ours | unused == {name: leaf.shape for name, leaf in listed.items()}


def test_a_layer_that_has_no_place_is_noticed():
    sizes = release.VQGANSizes.read('listed', abstract(release_files.LISTED['stage1']))
    model = VQGAN(classes=2, encoder_res_blocks=(1, 1, 1, 2))
    with pytest.raises(ValueError, match=r'not on both sides: params/encoder/block_3_1/conv_0/bias'):
        release.shapes(sizes.places(), vqgan_shapes(model, (128, 128, 128)))


@pytest.fixture(scope='module')
def stage1():
    tensors = release_files.stage1(GRID)
    places = release.VQGANSizes.read('w.pth', tensors).places()
    return tensors, places, release.to_tree('w.pth', tensors, places)


def test_stage_1_goes_there_and_back_bit_by_bit(stage1):
    tensors, places, tree = stage1
    back = release.from_tree(tree, places)
    assert back.keys() == places.keys()
    for name, array in back.items():
        assert array.tobytes() == tensors[name].tobytes(), name


def test_layouts_of_stage_1(stage1):
    tensors, _, tree = stage1
    params = tree['params']
    kernel = tensors['Encoder.conv2.conv.0.weight']  # [out, in, d, h, w]
    for out, into, d, h, w in [(0, 0, 0, 0, 0), (15, 7, 3, 2, 1), (4, 5, 1, 3, 0)]:
        assert params['encoder']['conv_1']['kernel'][d, h, w, into, out] == kernel[out, into, d, h, w]
    np.testing.assert_array_equal(params['classifier']['hidden']['kernel'].T, tensors['ScoreNet.classifier.0.weight'])
    np.testing.assert_array_equal(
        params['decoder']['block_0_0']['norm']['scale'], tensors['Decoder.res_block4.conv_module.4.gn.weight']
    )
    np.testing.assert_array_equal(
        params['encoder']['block_hidden']['conv_1']['bias'], tensors['Encoder.res_block5.conv_module.3.bias']
    )
    np.testing.assert_array_equal(tree['codebook']['codes'], tensors['Codebook.embedding.weight'])
    np.testing.assert_array_equal(tree['codebook']['usage'], tensors['Codebook.cluster_size'])


def test_stage_2_goes_there_and_back_bit_by_bit():
    tensors = release_files.stage2(GRID)
    sizes = release.TransformerSizes.read('w.pth', tensors)
    assert sizes == release.TransformerSizes(2, 32, vocabulary=24, classes=3, positions=20)
    cut, rest = release.cut_positions('w.pth', tensors, 6)
    params = release.to_tree('w.pth', cut, sizes.places())['params']
    for layer in range(2):
        weight = tensors[f'transformer.blocks.{layer}.mlp.0.weight']
        np.testing.assert_array_equal(params['blocks']['up']['kernel'][layer], weight.T)
    np.testing.assert_array_equal(params['position_embedding'], tensors['transformer.pos_emb'][0, :6])
    np.testing.assert_array_equal(params['token_embedding'], tensors['transformer.tok_emb.weight'])
    back = release.join_positions(release.from_tree({'params': params}, sizes.places()), rest)
    assert back.keys() == sizes.places().keys()
    for name, array in back.items():
        assert array.tobytes() == tensors[name].tobytes(), name


def test_blocks_without_tensors_are_none(stage1):
    tensors = {name: array for name, array in stage1[0].items() if not name.startswith('Decoder.res_block1.')}
    sizes = release.VQGANSizes.read('w.pth', tensors)
    assert (sizes.encoder_res_blocks, sizes.decoder_res_blocks) == ((1, 1, 1, 1), (1, 1, 1, 0))
    assert not any(place.path.startswith('params/decoder/block_3') for place in sizes.places().values())


def test_a_mask_is_causal():
    mask = release.TransformerSizes(1, 8, 9, 2, positions=3).unused()['transformer.blocks.0.attn.mask'].make()
    np.testing.assert_array_equal(mask, [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]])


@pytest.mark.parametrize(
    ('name', 'change', 'told'),
    [
        ('preV_conv.conv.bias', lambda a: a.astype(np.float64), 'preV_conv.conv.bias is float64, float32 is expected'),
        ('Decoder.final_conv.bias', lambda a: a * np.nan, 'Decoder.final_conv.bias has values that are not finite'),
        (
            'Encoder.res_block2.conv_module.4.gn.bias',
            lambda a: a + 1,
            r'Encoder.res_block2.conv_module.4.gn.bias and Encoder.res_block2.group_norm.gn.bias are one tensor',
        ),
    ],
)
def test_tensors_that_cannot_be_taken_are_named(stage1, name, change, told):
    tensors, places, _ = stage1
    with pytest.raises(InputError, match=f'w.pth: {told}'):
        release.to_tree('w.pth', {**tensors, name: change(tensors[name])}, places)


def test_sizes_that_cannot_be_told(stage1):
    tensors = stage1[0]

    def without(name):
        return {key: array for key, array in tensors.items() if key != name}

    for name in ('Encoder.conv3.conv.0.weight', 'Codebook.embedding.weight', 'ScoreNet.classifier.4.weight'):
        with pytest.raises(InputError, match=f'w.pth has no {name}'):
            release.VQGANSizes.read('w.pth', without(name))
    with pytest.raises(InputError, match=r'Encoder.conv1.conv.0.weight has the shape \(3, 2\); 5 axes'):
        release.VQGANSizes.read('w.pth', {**tensors, 'Encoder.conv1.conv.0.weight': np.zeros((3, 2))})
    with pytest.raises(InputError, match='no whole number of codes of 16'):
        release.VQGANSizes.read('w.pth', {**tensors, 'ScoreNet.classifier.0.weight': np.zeros((64, 97))})
    with pytest.raises(InputError, match=r'has no Encoder.conv2'):
        release.VQGANSizes.read('w.pth', {'Encoder.conv1.conv.0.weight': np.zeros((8, 1, 4, 4, 4))})
    stage2 = release_files.stage2(GRID, layers=0)
    with pytest.raises(InputError, match=r'has no transformer.blocks.0'):
        release.TransformerSizes.read('w.pth', stage2)
    with pytest.raises(InputError, match='has 20 positions, the latent grid 21 tokens'):
        release.cut_positions('w.pth', stage2, 21)


def test_codes_have_unit_length():
    codes = np.eye(3, dtype=np.float32)
    release.check_codes('w.pth', codes)
    with pytest.raises(InputError, match='the codebook was not trained: its codes have lengths from 0 to 1'):
        release.check_codes('w.pth', codes * [[1], [1], [0]])


def test_the_grid_is_a_cube_or_told():
    assert release.find_grid('w.pth', 512, ()) == (8, 8, 8)
    assert release.find_grid('w.pth', 6, (1, 2, 3)) == (1, 2, 3)
    with pytest.raises(InputError, match=r'a latent grid of 6 regions, which is no cube: .*--config.grid'):
        release.find_grid('w.pth', 6, ())
    with pytest.raises(InputError, match=r'of 8 regions, which is config.grid=\(1, 2, 3\)'):
        release.find_grid('w.pth', 8, (1, 2, 3))
