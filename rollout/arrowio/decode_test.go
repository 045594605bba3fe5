package arrowio

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/apache/arrow/go/v17/arrow"
	"github.com/apache/arrow/go/v17/arrow/array"
	"github.com/apache/arrow/go/v17/arrow/ipc"
	"github.com/apache/arrow/go/v17/arrow/memory"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"trainerd/internal/fault"
	"trainerd/rollout"
)

var (
	testSchema = rollout.Schema{Objective: "sa_grpo", RewardWeights: map[string]float64{"format": 1, "penalty": -1}}
	testLimits = rollout.Limits{MaxBytes: 1 << 20, MaxRows: 1000, MaxTokens: 10000, MaxPromptTokens: 100, MaxCompletionTokens: 100, Vocab: 1000}
)

// unread leaves out what a batch remembers of its rows once they were fingerprinted.
var unread = cmpopts.IgnoreUnexported(rollout.Batch{})

// goldenBatch is what testdata/goldens.py wrote.
func goldenBatch() *rollout.Batch {
	b := &rollout.Batch{Components: []string{"format", "penalty"}}
	for i, r := range []rollout.Rollout{
		{Components: []float64{1, 0.25}, PolicyStep: 0},
		{Components: []float64{0, 0.5}, PolicyStep: 1, Truncated: true},
		{Components: []float64{0.5, 0}, PolicyStep: rollout.NoPolicyStep},
		{Components: []float64{0, 1}, PolicyStep: 3},
		{Components: []float64{1, 0}, PolicyStep: 4},
		{Components: []float64{1, 0.125}, PolicyStep: 5, Truncated: true},
	} {
		r.GroupID, r.Prompt = "alert-1", []int32{1, 2, 3}
		if i%2 == 1 {
			r.GroupID, r.Prompt = "alert-2", []int32{7}
		}
		r.ID = "r" + string(rune('0'+i))
		r.Reward = r.Components[0] - r.Components[1]
		for t := range 1 + i%3 {
			r.Completion = append(r.Completion, int32(10+i))
			r.LossMask = append(r.LossMask, t != 1)
			r.SamplerLogProbs = append(r.SamplerLogProbs, -0.5*float32(t+1))
			if t == 1 { // masked: what is there is ignored
				r.SamplerLogProbs[t] = 0
			}
		}
		b.Rollouts = append(b.Rollouts, r)
	}
	return b
}

func golden(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "v1", name+".arrow"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var goldens = []string{"plain", "batches", "lz4", "zstd", "dictionary", "dictionary_replaced", "dictionary_delta", "large", "narrow", "sliced"}

func TestDecodeReadsWhatPyarrowWrote(t *testing.T) {
	for _, name := range goldens {
		t.Run(name, func(t *testing.T) {
			data := golden(t, name)
			got, err := Decode(bytes.NewReader(data), testSchema, testLimits)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(goldenBatch(), got, unread); diff != "" {
				t.Fatal(diff)
			}
			slow, err := Decode(iotest.OneByteReader(bytes.NewReader(data)), testSchema, testLimits)
			if diff := cmp.Diff(got, slow, unread); diff != "" || err != nil {
				t.Fatal(diff, err)
			}
			whole, err := DecodeBytes(data, testSchema, testLimits)
			clear(data) // the batch must not refer to the bytes
			if diff := cmp.Diff(got, whole, unread); diff != "" || err != nil {
				t.Fatal(diff, err)
			}
			if &got.Rollouts[0].Prompt[0] != &got.Rollouts[2].Prompt[0] {
				t.Fatal("the rows of a group hold their prompt twice")
			}
		})
	}
	t.Run("fixed_size", func(t *testing.T) {
		got, err := DecodeBytes(golden(t, "fixed_size"), testSchema, testLimits)
		want := goldenBatch()
		want.Rollouts = []rollout.Rollout{want.Rollouts[0], want.Rollouts[2], want.Rollouts[4]}
		if diff := cmp.Diff(want, got, unread); diff != "" || err != nil {
			t.Fatal(diff, err)
		}
	})
}

// The Arrow library reads the same goldens with the same types and row count, so
// that what is accepted here is what Arrow means by it.
func TestGoldensAreArrow(t *testing.T) {
	for _, name := range goldens {
		r, err := ipc.NewReader(bytes.NewReader(golden(t, name)))
		if err != nil {
			t.Fatal(name, err)
		}
		want := goldenBatch()
		n := 0
		for r.Next() {
			rec := r.Record()
			for i := range int(rec.NumRows()) {
				group := ""
				switch c := rec.Column(0).(type) {
				case *array.String:
					group = c.Value(i)
				case *array.LargeString:
					group = c.Value(i)
				case *array.Dictionary:
					group = c.Dictionary().(*array.String).Value(c.GetValueIndex(i))
				}
				tokens := rec.Column(2).(array.ListLike)
				lo, hi := tokens.ValueOffsets(i)
				if group != want.Rollouts[n].GroupID || int(hi-lo) != len(want.Rollouts[n].Completion) || tokens.ListValues().ValueStr(int(lo)) != fmt.Sprint(want.Rollouts[n].Completion[0]) {
					t.Fatalf("%s row %d: group %q, %d tokens", name, n, group, hi-lo)
				}
				n++
			}
		}
		if r.Err() != nil || n != 6 {
			t.Fatal(name, n, r.Err())
		}
		r.Release()
	}
}

func TestEncodeRoundTrip(t *testing.T) {
	plain := goldenBatch()
	plain.Components, plain.HasReward = nil, true
	for i := range plain.Rollouts {
		plain.Rollouts[i].Components, plain.Rollouts[i].ID, plain.Rollouts[i].LossMask, plain.Rollouts[i].SamplerLogProbs = nil, "", nil, nil
		plain.Rollouts[i].PolicyStep, plain.Rollouts[i].Truncated = rollout.NoPolicyStep, false
	}
	weighted := goldenBatch()
	weighted.Components = nil
	for i := range weighted.Rollouts {
		r := &weighted.Rollouts[i]
		r.Components, r.Reward, r.SamplerLogProbs, r.LossMask = nil, 0, nil, nil
		if i > 0 {
			r.LossWeights = slices.Repeat([]float32{0.5}, len(r.Completion))
		}
	}
	for name, c := range map[string]struct {
		batch  *rollout.Batch
		schema rollout.Schema
	}{
		"components":   {goldenBatch(), testSchema},
		"plain reward": {plain, testSchema},
		"weights":      {weighted, rollout.Schema{Objective: rollout.CrossEntropy}},
		"inspection":   {weighted, rollout.Schema{AnyComponent: true}},
	} {
		for _, codec := range []string{"", "lz4", "zstd"} {
			t.Run(name+codec, func(t *testing.T) {
				var buf bytes.Buffer
				if err := Encode(&buf, c.batch, codec); err != nil {
					t.Fatal(err)
				}
				got, err := Decode(&buf, c.schema, testLimits)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(c.batch, got, unread); diff != "" {
					t.Fatal(diff)
				}
			})
		}
	}
	if err := Encode(&bytes.Buffer{}, plain, "gzip"); fault.KindOf(err) != fault.Invalid {
		t.Fatal(err)
	}
	half := goldenBatch()
	half.Rollouts[3].SamplerLogProbs = nil
	if err := Encode(&bytes.Buffer{}, half, ""); fault.KindOf(err) != fault.Invalid {
		t.Fatal(err)
	}
}

// columnOf builds a column from a JSON array.
func columnOf(t *testing.T, typ arrow.DataType, json string) arrow.Array {
	t.Helper()
	a, _, err := array.FromJSON(memory.DefaultAllocator, typ, strings.NewReader(json))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

type col struct {
	name string
	a    arrow.Array
}

func streamOf(t *testing.T, meta map[string]string, cols ...col) []byte {
	t.Helper()
	var fields []arrow.Field
	var arrays []arrow.Array
	for _, c := range cols {
		fields = append(fields, arrow.Field{Name: c.name, Type: c.a.DataType(), Nullable: true})
		arrays = append(arrays, c.a)
	}
	md := arrow.MetadataFrom(meta)
	schema := arrow.NewSchema(fields, &md)
	rec := array.NewRecord(schema, arrays, int64(arrays[0].Len()))
	var buf bytes.Buffer
	w := ipc.NewWriter(&buf, ipc.WithSchema(schema))
	if err := w.Write(rec); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// A bad batch is refused with its kind, and the fault names column and row.
func TestDecodeRefuses(t *testing.T) {
	type change struct {
		name string
		typ  arrow.DataType
		json string // "" removes the column
	}
	f32, f64, i32, i64 := arrow.PrimitiveTypes.Float32, arrow.PrimitiveTypes.Float64, arrow.PrimitiveTypes.Int32, arrow.PrimitiveTypes.Int64
	text := arrow.BinaryTypes.String
	base := []change{
		{"group_id", text, `["a","a","b"]`},
		{"prompt_tokens", tokenList, `[[1,2],[1,2],[3]]`},
		{"completion_tokens", tokenList, `[[4],[5,6],[7,8]]`},
		{"reward", f64, `[0,1,2]`},
	}
	none := map[string]string{}
	for _, c := range []struct {
		name   string
		change []change
		meta   map[string]string
		schema *rollout.Schema
		limits func(*rollout.Limits)
		kind   fault.Kind
		code   string
		column string
		row    int
	}{
		{name: "unknown column", change: []change{{"colour", f32, `[1,2,3]`}}, code: "unknown_column", column: "colour", row: -1},
		{name: "unknown column of a strange type", change: []change{{"colour", arrow.StructOf(arrow.Field{Name: "x", Type: f32}), `[null,null,null]`}}, code: "unknown_column", column: "colour", row: -1},
		{name: "reserved advantages", change: []change{{"advantages", f32, `[1,2,3]`}}, code: "reserved_column", column: "advantages", row: -1},
		{name: "reserved ref_logprobs", change: []change{{"ref_logprobs", floatList, `[[],[],[]]`}}, code: "reserved_column", column: "ref_logprobs", row: -1},
		{name: "reserved meta_", change: []change{{"meta_task", text, `["","",""]`}}, code: "reserved_column", column: "meta_task", row: -1},
		{name: "no group_id", change: []change{{"group_id", nil, ""}}, code: "missing_column", column: "group_id", row: -1},
		{name: "no prompt_tokens", change: []change{{"prompt_tokens", nil, ""}}, code: "missing_column", column: "prompt_tokens", row: -1},
		{name: "no completion_tokens", change: []change{{"completion_tokens", nil, ""}}, code: "missing_column", column: "completion_tokens", row: -1},
		{name: "no reward", change: []change{{"reward", nil, ""}}, code: "missing_column", column: "reward", row: -1},
		{name: "sampler log-probs required", schema: &rollout.Schema{Objective: "grpo", SamplerLogProbs: true}, code: "missing_column", column: "sampler_logprobs", row: -1},
		{name: "reward and components", change: []change{{"reward_format", f32, `[1,2,3]`}}, code: "reward_and_components", column: "reward", row: -1},
		{name: "component without weight", change: []change{{"reward", nil, ""}, {"reward_style", f32, `[1,2,3]`}}, code: "unknown_component", column: "reward_style", row: -1},
		{name: "component without name", change: []change{{"reward_", f32, `[1,2,3]`}}, code: "unknown_column", column: "reward_", row: -1},
		{name: "component of text", change: []change{{"reward", nil, ""}, {"reward_format", text, `["1","2","3"]`}}, code: "wrong_type", column: "reward_format", row: -1},
		{name: "loss_weights with sa_grpo", change: []change{{"loss_weights", floatList, `[[1],[1,1],[1,1]]`}}, code: "unexpected_column", column: "loss_weights", row: -1},
		{name: "schema version", meta: map[string]string{"trainerd.schema": "2"}, code: "schema_version", column: "trainerd.schema", row: -1},
		{name: "group_id int", change: []change{{"group_id", i64, `[1,2,3]`}}, code: "wrong_type", column: "group_id", row: -1},
		{name: "group_id binary", change: []change{{"group_id", arrow.BinaryTypes.Binary, `["","",""]`}}, code: "wrong_type", column: "group_id", row: -1},
		{name: "tokens of floats", change: []change{{"prompt_tokens", floatList, `[[1],[1],[1]]`}}, code: "wrong_type", column: "prompt_tokens", row: -1},
		{name: "tokens not in lists", change: []change{{"completion_tokens", i32, `[1,1,1]`}}, code: "wrong_type", column: "completion_tokens", row: -1},
		{name: "tokens in lists of lists", change: []change{{"completion_tokens", arrow.ListOf(tokenList), `[[[1]],[[1]],[[1]]]`}}, code: "wrong_type", column: "completion_tokens", row: -1},
		{name: "tokens in list views", change: []change{{"completion_tokens", arrow.ListViewOf(i32), `[[1],[1],[1]]`}}, code: "wrong_type", column: "completion_tokens", row: -1},
		{name: "reward int", change: []change{{"reward", i64, `[1,1,1]`}}, code: "wrong_type", column: "reward", row: -1},
		{name: "policy_step float", change: []change{{"policy_step", f32, `[1,1,1]`}}, code: "wrong_type", column: "policy_step", row: -1},
		{name: "truncated int", change: []change{{"truncated", i64, `[1,1,1]`}}, code: "wrong_type", column: "truncated", row: -1},
		{name: "loss_mask of ints", change: []change{{"loss_mask", tokenList, `[[1],[1,1],[1,1]]`}}, code: "wrong_type", column: "loss_mask", row: -1},
		{name: "all null", change: []change{{"policy_step", arrow.Null, `[null,null,null]`}}, code: "wrong_type", column: "policy_step", row: -1},

		{name: "no rows", change: []change{{"group_id", text, `[]`}, {"prompt_tokens", tokenList, `[]`}, {"completion_tokens", tokenList, `[]`}, {"reward", f64, `[]`}}, code: "empty_batch", row: -1},
		{name: "null group", change: []change{{"group_id", text, `["a",null,"b"]`}}, code: "invalid_row", column: "group_id", row: 1},
		{name: "empty group", change: []change{{"group_id", text, `["a","a",""]`}}, code: "invalid_row", column: "group_id", row: 2},
		{name: "long group", change: []change{{"group_id", text, `["a","a","` + strings.Repeat("x", 1025) + `"]`}}, code: "invalid_row", column: "group_id", row: 2},
		{name: "long rollout id", change: []change{{"rollout_id", text, `["a","` + strings.Repeat("x", 1025) + `","c"]`}}, code: "invalid_row", column: "rollout_id", row: 1},
		{name: "null prompt", change: []change{{"prompt_tokens", tokenList, `[[1,2],null,[3]]`}}, code: "invalid_row", column: "prompt_tokens", row: 1},
		{name: "empty prompt", change: []change{{"prompt_tokens", tokenList, `[[1,2],[1,2],[]]`}}, code: "invalid_row", column: "prompt_tokens", row: 2},
		{name: "null in a prompt", change: []change{{"prompt_tokens", tokenList, `[[1,2],[1,null],[3]]`}}, code: "invalid_row", column: "prompt_tokens", row: 1},
		{name: "unequal prompts", change: []change{{"prompt_tokens", tokenList, `[[1,2],[1,3],[3]]`}}, code: "unequal_prompts", column: "prompt_tokens", row: 1},
		{name: "null completion", change: []change{{"completion_tokens", tokenList, `[[4],null,[7,8]]`}}, code: "invalid_row", column: "completion_tokens", row: 1},
		{name: "empty completion", change: []change{{"completion_tokens", tokenList, `[[4],[5,6],[]]`}}, code: "invalid_row", column: "completion_tokens", row: 2},
		{name: "null token", change: []change{{"completion_tokens", tokenList, `[[4],[5,6],[7,null]]`}}, code: "invalid_row", column: "completion_tokens", row: 2},
		{name: "token at the vocabulary", change: []change{{"completion_tokens", tokenList, `[[4],[5,6],[7,1000]]`}}, code: "token_out_of_range", column: "completion_tokens", row: 2},
		{name: "negative token", change: []change{{"prompt_tokens", tokenList, `[[1,-2],[1,2],[3]]`}}, code: "token_out_of_range", column: "prompt_tokens", row: 0},
		{name: "token over 32 bits", change: []change{{"completion_tokens", arrow.ListOf(i64), `[[4],[4294967300],[7]]`}}, code: "token_out_of_range", column: "completion_tokens", row: 1},
		{name: "token over 63 bits", change: []change{{"completion_tokens", arrow.ListOf(arrow.PrimitiveTypes.Uint64), `[[4],[18446744073709551615],[7]]`}}, code: "token_out_of_range", column: "completion_tokens", row: 1},
		{name: "null reward", change: []change{{"reward", f64, `[0,null,1]`}}, code: "invalid_row", column: "reward", row: 1},
		{name: "sum of components overflows", change: []change{{"reward", nil, ""}, {"reward_format", f64, `[0,1e308,1]`}, {"reward_penalty", f64, `[0,-1e308,1]`}}, code: "invalid_row", column: "reward_format", row: 1},
		{name: "log-probs too short", change: []change{{"sampler_logprobs", floatList, `[[-1],[-1],[-1,-1]]`}}, code: "invalid_row", column: "sampler_logprobs", row: 1},
		{name: "null log-probs", change: []change{{"sampler_logprobs", floatList, `[[-1],null,[-1,-1]]`}}, code: "invalid_row", column: "sampler_logprobs", row: 1},
		{name: "null log-prob", change: []change{{"sampler_logprobs", floatList, `[[-1],[-1,-1],[-1,null]]`}}, code: "invalid_row", column: "sampler_logprobs", row: 2},
		{name: "positive log-prob", change: []change{{"sampler_logprobs", floatList, `[[0.01],[-1,-1],[-1,-1]]`}}, code: "invalid_row", column: "sampler_logprobs", row: 0},
		{name: "log-prob that overflows float32", change: []change{{"sampler_logprobs", arrow.ListOf(f64), `[[-1],[-1,-1e300],[-1,-1]]`}}, code: "invalid_row", column: "sampler_logprobs", row: 1},
		{name: "mask too long", change: []change{{"loss_mask", boolList, `[[true],[true,true,false],[true,true]]`}}, code: "invalid_row", column: "loss_mask", row: 1},
		{name: "null in a mask", change: []change{{"loss_mask", boolList, `[[true],[true,null],[true,true]]`}}, code: "invalid_row", column: "loss_mask", row: 1},
		{name: "negative weight", schema: &rollout.Schema{Objective: rollout.CrossEntropy}, change: []change{{"loss_weights", floatList, `[[1],[1,-1],[1,1]]`}}, code: "invalid_row", column: "loss_weights", row: 1},
		{name: "null weight", schema: &rollout.Schema{Objective: rollout.CrossEntropy}, change: []change{{"loss_weights", floatList, `[[1],[1,null],[1,1]]`}}, code: "invalid_row", column: "loss_weights", row: 1},
		{name: "negative policy step", change: []change{{"policy_step", i64, `[0,1,-1]`}}, code: "invalid_row", column: "policy_step", row: 2},

		{name: "body", limits: func(l *rollout.Limits) { l.MaxBytes = 400 }, kind: fault.TooLarge, code: "body_too_large", row: -1},
		{name: "rows", limits: func(l *rollout.Limits) { l.MaxRows = 2 }, kind: fault.TooLarge, code: "too_many_rows", row: -1},
		{name: "tokens", limits: func(l *rollout.Limits) { l.MaxTokens = 8 }, kind: fault.TooLarge, code: "too_many_tokens", column: "completion_tokens", row: 2},
		{name: "prompt length", limits: func(l *rollout.Limits) { l.MaxPromptTokens = 1 }, code: "invalid_row", column: "prompt_tokens", row: 0},
		{name: "completion length", limits: func(l *rollout.Limits) { l.MaxCompletionTokens = 1 }, code: "invalid_row", column: "completion_tokens", row: 1},
		{name: "sequence length", limits: func(l *rollout.Limits) { l.MaxSequence = 3 }, code: "invalid_row", column: "completion_tokens", row: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			cols := slices.Clone(base)
			for _, x := range c.change {
				at := slices.IndexFunc(cols, func(b change) bool { return b.name == x.name })
				switch {
				case x.json == "":
					cols = slices.Delete(cols, at, at+1)
				case at >= 0:
					cols[at] = x
				default:
					cols = append(cols, x)
				}
			}
			var built []col
			for _, x := range cols {
				built = append(built, col{x.name, columnOf(t, x.typ, x.json)})
			}
			meta, schema, limits := none, testSchema, testLimits
			if c.meta != nil {
				meta = c.meta
			}
			if c.schema != nil {
				schema = *c.schema
			}
			if c.limits != nil {
				c.limits(&limits)
			}
			if c.kind == fault.Internal {
				c.kind = fault.Invalid
			}
			b, err := DecodeBytes(streamOf(t, meta, built...), schema, limits)
			f, ok := fault.As(err)
			if !ok || f.Kind != c.kind || f.Code != c.code || b != nil {
				t.Fatalf("got %v, want %v %s", err, c.kind, c.code)
			}
			if c.column != "" && (len(f.Fields) != 1 || f.Fields[0].Name != c.column || f.Fields[0].Row != c.row) {
				t.Fatalf("names %+v, want column %s of row %d", f.Fields, c.column, c.row)
			}
		})
	}
}

// Values that JSON cannot write.
func TestDecodeRefusesWhatIsNotFinite(t *testing.T) {
	one := func(v float64) arrow.Array {
		b := array.NewFloat64Builder(memory.DefaultAllocator)
		b.AppendValues([]float64{0, v}, nil)
		return b.NewArray()
	}
	list := func(v float32) arrow.Array {
		b := array.NewListBuilder(memory.DefaultAllocator, arrow.PrimitiveTypes.Float32)
		for _, x := range []float32{0, v} {
			b.Append(true)
			b.ValueBuilder().(*array.Float32Builder).Append(x)
		}
		return b.NewArray()
	}
	nan, inf := math.NaN(), math.Inf(1)
	for _, c := range []struct {
		column string
		a      arrow.Array
		schema rollout.Schema
	}{
		{"reward", one(nan), testSchema}, {"reward", one(inf), testSchema}, {"reward", one(-inf), testSchema},
		{"reward_format", one(nan), testSchema}, {"reward_format", one(inf), testSchema},
		{"sampler_logprobs", list(float32(nan)), testSchema}, {"sampler_logprobs", list(float32(-inf)), testSchema}, {"sampler_logprobs", list(float32(inf)), testSchema},
		{"loss_weights", list(float32(nan)), rollout.Schema{Objective: rollout.CrossEntropy}}, {"loss_weights", list(float32(inf)), rollout.Schema{Objective: rollout.CrossEntropy}},
	} {
		cols := []col{
			{"group_id", columnOf(t, arrow.BinaryTypes.String, `["a","a"]`)},
			{"prompt_tokens", columnOf(t, tokenList, `[[1],[1]]`)},
			{"completion_tokens", columnOf(t, tokenList, `[[1],[1]]`)},
			{c.column, c.a},
		}
		if !strings.HasPrefix(c.column, "reward") {
			cols = append(cols, col{"reward", one(0)})
		}
		_, err := DecodeBytes(streamOf(t, nil, cols...), c.schema, testLimits)
		f, ok := fault.As(err)
		if !ok || f.Kind != fault.Invalid || f.Fields[0].Name != c.column || f.Fields[0].Row != 1 {
			t.Errorf("%s %v: %v", c.column, c.a, err)
		}
	}
}

func TestHalf(t *testing.T) {
	for bits, want := range map[uint16]float64{0: 0, 0x3c00: 1, 0xc000: -2, 0x7bff: 65504, 1: 0x1p-24, 0x0400: 0x1p-14, 0x3555: 0.333251953125, 0x7c00: math.Inf(1), 0xfc00: math.Inf(-1)} {
		if got := half(bits); got != want {
			t.Errorf("half(%#x) = %v, want %v", bits, got, want)
		}
	}
	if !math.IsNaN(half(0x7e00)) {
		t.Error("half(0x7e00) is a number")
	}
}

func TestScores(t *testing.T) {
	in := []ScoreRow{{Prompt: []int32{1, 2}, Completion: []int32{3}}, {Prompt: []int32{4}, Completion: []int32{5, 6}}}
	out := slices.Clone(in)
	for i := range out {
		for range out[i].Completion {
			out[i].LogProbs = append(out[i].LogProbs, -0.5)
			out[i].Entropy = append(out[i].Entropy, 2)
		}
	}
	for _, rows := range [][]ScoreRow{in, out} {
		var buf bytes.Buffer
		if err := EncodeScores(&buf, rows); err != nil {
			t.Fatal(err)
		}
		got, err := DecodeScores(&buf, testLimits)
		if diff := cmp.Diff(rows, got); diff != "" || err != nil {
			t.Fatal(diff, err)
		}
	}
	if _, err := DecodeScores(bytes.NewReader(golden(t, "plain")), testLimits); fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), "group_id") {
		t.Fatal(err)
	}
	tight := testLimits
	tight.MaxTokens = 5
	var buf bytes.Buffer
	if err := EncodeScores(&buf, in); err != nil {
		t.Fatal(err)
	}
	if _, err := DecodeScores(&buf, tight); fault.KindOf(err) != fault.TooLarge {
		t.Fatal(err)
	}
	bad := []ScoreRow{{Prompt: []int32{1}, Completion: []int32{2, 3}, LogProbs: []float32{-1}}}
	if err := EncodeScores(&buf, bad); fault.KindOf(err) != fault.Invalid {
		t.Fatal(err)
	}
}

func TestEncodeMetrics(t *testing.T) {
	var buf bytes.Buffer
	if err := EncodeMetrics(&buf, []int64{1, 2}, []map[string]float64{{"loss": 0.5}, {"kl": 1, "loss": math.NaN()}}); err != nil {
		t.Fatal(err)
	}
	r, err := ipc.NewReader(&buf)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Release()
	if !r.Next() {
		t.Fatal(r.Err())
	}
	rec := r.Record()
	names := []string{}
	for _, f := range rec.Schema().Fields() {
		names = append(names, f.Name)
	}
	if diff := cmp.Diff([]string{"step", "kl", "loss"}, names); diff != "" {
		t.Fatal(diff)
	}
	kl, loss := rec.Column(1).(*array.Float64), rec.Column(2).(*array.Float64)
	if rec.Column(0).(*array.Int64).Value(1) != 2 || !kl.IsNull(0) || kl.Value(1) != 1 || loss.Value(0) != 0.5 || !math.IsNaN(loss.Value(1)) {
		t.Fatal(rec)
	}
}

// TestFastLogProbsAreTheSlowOnes: bits that the pass over whole rows lets through
// are those that the definition does, at every border of float32.
func TestFastLogProbsAreTheSlowOnes(t *testing.T) {
	const maxLogProbBits, maxFiniteBits = 0x3A800000, 0x7F7FFFFF
	if math.Float32bits(maxLogProb) != maxLogProbBits || math.Float32bits(math.MaxFloat32) != maxFiniteBits {
		t.Fatal("the constants are of other numbers")
	}
	var near []uint32
	for _, b := range []uint32{0, maxLogProbBits, maxFiniteBits, 0x7F800000, 0x7FC00000, 1 << 31, 1<<31 | maxLogProbBits, 1<<31 | maxFiniteBits, 0xFF800000, 0xFFC00000, 0xFFFFFFFF} {
		for d := range uint32(5) {
			near = append(near, b+d-2)
		}
	}
	for _, bits := range near {
		data := binary.LittleEndian.AppendUint32(nil, bits)
		v := math.Float32frombits(bits)
		want := v <= maxLogProb && !math.IsInf(float64(v), 0)
		good := binary.LittleEndian.AppendUint32(nil, math.Float32bits(-2))
		for _, n := range []int{1, 2, 3, 31, 32, 33, 34, 65} { // values are looked at in blocks of 32
			for at := range n {
				var row []byte
				for i := range n {
					if i == at {
						row = append(row, data...)
					} else {
						row = append(row, good...)
					}
				}
				a := &vec{typ: &dtype{class: floatClass, bits: 32}, n: n, data: row}
				dst := make([]float32, n)
				if got := a.logProbs(dst, 0); got != want || got && math.Float32bits(dst[at]) != bits {
					t.Errorf("%08x (%v) at %d of %d: passed %v, expected %v", bits, v, at, n, got, want)
				}
			}
		}
	}
}

// TestTokensByFour compares the pass over whole rows with one value at a time, for
// every length, with the bad token at every place.
func TestTokensByFour(t *testing.T) {
	for _, vocab := range []uint32{1, 2, 1000, math.MaxInt32} {
		for n := range 11 {
			for bad := -1; bad < n; bad++ {
				for _, off := range []uint32{vocab, vocab + 1, 1 << 31, 1<<31 + vocab - 1, 0xFFFFFFFF} {
					data := make([]byte, 0, 4*n+8)
					var want []int32
					for i := range n {
						v := (vocab - 1) / uint32(i+1) // the greatest among them
						want = append(want, int32(v))
						if i == bad {
							v = off
						}
						data = binary.LittleEndian.AppendUint32(data, v)
					}
					dst := make([]int32, n)
					a := &vec{typ: &dtype{class: intClass, bits: 32}, n: n, data: data}
					if got := a.tokens(dst, 0, int(vocab)); got != bad {
						t.Fatalf("vocab %d, %d tokens, the bad one %d at %d: found at %d", vocab, n, off, bad, got)
					}
					if bad < 0 && !slices.Equal(dst, want) {
						t.Fatalf("%d tokens: %v, expected %v", n, dst, want)
					}
				}
			}
		}
	}
}
