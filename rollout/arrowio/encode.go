package arrowio

import (
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/apache/arrow/go/v17/arrow"
	"github.com/apache/arrow/go/v17/arrow/array"
	"github.com/apache/arrow/go/v17/arrow/ipc"
	"github.com/apache/arrow/go/v17/arrow/memory"

	"trainerd/internal/fault"
	"trainerd/rollout"
)

var (
	tokenList = arrow.ListOf(arrow.PrimitiveTypes.Int32)
	floatList = arrow.ListOf(arrow.PrimitiveTypes.Float32)
	boolList  = arrow.ListOf(arrow.FixedWidthTypes.Boolean)
)

// Encode writes a batch as one IPC stream. Codec is "", "lz4" or "zstd". A
// column that no row needs is left out; one that some rows have and others lack
// is an Invalid fault where null would not mean the same.
func Encode(w io.Writer, b *rollout.Batch, codec string) error {
	c, err := rolloutColumnsOf(b)
	if err != nil {
		return err
	}
	return c.write(w, codec)
}

// table of columns to write.
type columns struct {
	fields []arrow.Field
	fill   []func(array.Builder)
	rows   int
}

func (c *columns) add(name string, t arrow.DataType, fill func(array.Builder)) {
	c.fields = append(c.fields, arrow.Field{Name: name, Type: t, Nullable: true})
	c.fill = append(c.fill, fill)
}

func (c *columns) write(w io.Writer, codec string) error {
	options := []ipc.Option{}
	switch codec {
	case "":
	case "lz4":
		options = append(options, ipc.WithLZ4())
	case "zstd":
		options = append(options, ipc.WithZstd())
	default:
		return fault.BadField("codec", codec, `"", "lz4" or "zstd"`)
	}
	meta := arrow.NewMetadata([]string{schemaKey}, []string{schemaVersion})
	schema := arrow.NewSchema(c.fields, &meta)
	rb := array.NewRecordBuilder(memory.DefaultAllocator, schema)
	defer rb.Release()
	for i, fill := range c.fill {
		fill(rb.Field(i))
	}
	record := rb.NewRecord()
	defer record.Release()
	iw := ipc.NewWriter(w, append(options, ipc.WithSchema(schema))...)
	if err := iw.Write(record); err != nil {
		return fmt.Errorf("write arrow stream: %w", err)
	}
	if err := iw.Close(); err != nil {
		return fmt.Errorf("write arrow stream: %w", err)
	}
	return nil
}

// lists makes a filler from the list of each row; ok false is null.
func lists[T any, B interface{ AppendValues([]T, []bool) }](rows int, values func(i int) (v []T, ok bool)) func(array.Builder) {
	return func(b array.Builder) {
		lb := b.(*array.ListBuilder)
		vb := lb.ValueBuilder().(B)
		for i := range rows {
			v, ok := values(i)
			lb.Append(ok)
			if ok {
				vb.AppendValues(v, nil)
			}
		}
	}
}

// some says whether one row, and whether every row, has a thing.
func some(rows []rollout.Rollout, has func(*rollout.Rollout) bool) (one, all bool) {
	all = true
	for i := range rows {
		if has(&rows[i]) {
			one = true
		} else {
			all = false
		}
	}
	return one, all
}

func rolloutColumnsOf(b *rollout.Batch) (*columns, error) {
	rows := b.Rollouts
	n := len(rows)
	c := &columns{rows: n}
	text := func(value func(i int) string) func(array.Builder) {
		return func(b array.Builder) {
			for i := range n {
				if v := value(i); v == "" {
					b.AppendNull()
				} else {
					b.(*array.StringBuilder).Append(v)
				}
			}
		}
	}
	float := func(value func(i int) float64) func(array.Builder) {
		return func(b array.Builder) {
			for i := range n {
				b.(*array.Float64Builder).Append(value(i))
			}
		}
	}
	c.add("group_id", arrow.BinaryTypes.String, text(func(i int) string { return rows[i].GroupID }))
	if one, _ := some(rows, func(r *rollout.Rollout) bool { return r.ID != "" }); one {
		c.add("rollout_id", arrow.BinaryTypes.String, text(func(i int) string { return rows[i].ID }))
	}
	c.add("prompt_tokens", tokenList, lists[int32, *array.Int32Builder](n, func(i int) ([]int32, bool) { return rows[i].Prompt, true }))
	c.add("completion_tokens", tokenList, lists[int32, *array.Int32Builder](n, func(i int) ([]int32, bool) { return rows[i].Completion, true }))
	if b.HasReward {
		c.add("reward", arrow.PrimitiveTypes.Float64, float(func(i int) float64 { return rows[i].Reward }))
	}
	for k, name := range b.Components {
		for i := range rows {
			if len(rows[i].Components) != len(b.Components) {
				return nil, fault.BadRow(componentPrefix+name, i, fmt.Sprintf("%d components", len(rows[i].Components)), fmt.Sprint(len(b.Components)))
			}
		}
		c.add(componentPrefix+name, arrow.PrimitiveTypes.Float64, float(func(i int) float64 { return rows[i].Components[k] }))
	}
	if one, all := some(rows, func(r *rollout.Rollout) bool { return r.SamplerLogProbs != nil }); one {
		if !all {
			return nil, column("sampler_logprobs", "mixed_column", "rows with and without log-probs", "all or none")
		}
		c.add("sampler_logprobs", floatList, lists[float32, *array.Float32Builder](n, func(i int) ([]float32, bool) { return rows[i].SamplerLogProbs, true }))
	}
	if one, _ := some(rows, func(r *rollout.Rollout) bool { return r.LossMask != nil }); one {
		c.add("loss_mask", boolList, lists[bool, *array.BooleanBuilder](n, func(i int) ([]bool, bool) { return rows[i].LossMask, rows[i].LossMask != nil }))
	}
	if one, _ := some(rows, func(r *rollout.Rollout) bool { return r.LossWeights != nil }); one {
		c.add("loss_weights", floatList, lists[float32, *array.Float32Builder](n, func(i int) ([]float32, bool) { return rows[i].LossWeights, rows[i].LossWeights != nil }))
	}
	if one, _ := some(rows, func(r *rollout.Rollout) bool { return r.PolicyStep != rollout.NoPolicyStep }); one {
		c.add("policy_step", arrow.PrimitiveTypes.Int64, func(b array.Builder) {
			for i := range rows {
				if rows[i].PolicyStep == rollout.NoPolicyStep {
					b.AppendNull()
				} else {
					b.(*array.Int64Builder).Append(rows[i].PolicyStep)
				}
			}
		})
	}
	if one, _ := some(rows, func(r *rollout.Rollout) bool { return r.Truncated }); one {
		c.add("truncated", arrow.FixedWidthTypes.Boolean, func(b array.Builder) {
			for i := range rows {
				b.(*array.BooleanBuilder).Append(rows[i].Truncated)
			}
		})
	}
	return c, nil
}

// EncodeMetrics writes one row per step: column "step" (int64), then one
// nullable float64 column per name that occurs, sorted.
func EncodeMetrics(w io.Writer, steps []int64, metrics []map[string]float64) error {
	if len(steps) != len(metrics) {
		return fault.New(fault.Internal, "metrics", "encode metrics: %d steps, %d sets of metrics", len(steps), len(metrics))
	}
	c := &columns{rows: len(steps)}
	c.add("step", arrow.PrimitiveTypes.Int64, func(b array.Builder) { b.(*array.Int64Builder).AppendValues(steps, nil) })
	names := map[string]bool{}
	for _, m := range metrics {
		for name := range m {
			names[name] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		c.add(name, arrow.PrimitiveTypes.Float64, func(b array.Builder) {
			for _, m := range metrics {
				if v, ok := m[name]; ok {
					b.(*array.Float64Builder).Append(v)
				} else {
					b.AppendNull()
				}
			}
		})
	}
	return c.write(w, "")
}
