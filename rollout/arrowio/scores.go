package arrowio

import (
	"fmt"
	"io"

	"github.com/apache/arrow/go/v17/arrow/array"

	"trainerd/internal/fault"
	"trainerd/rollout"
)

// ScoreRow is one row of the logprobs endpoint.
type ScoreRow struct {
	Prompt, Completion []int32
	LogProbs, Entropy  []float32 // nil on input, len(Completion) on output
}

var scoreKinds = map[string]kind{"prompt_tokens": tokensKind, "completion_tokens": tokensKind, "logprobs": floatsKind, "entropy": floatsKind}

func checkScores(fields []field) error {
	has := map[string]bool{}
	for _, f := range fields {
		k, ok := scoreKinds[f.name]
		if !ok {
			return column(f.name, "unknown_column", "an unknown column", "one of prompt_tokens, completion_tokens, logprobs, entropy")
		}
		if has[f.name] {
			return column(f.name, "duplicate_column", "the column twice", "one column of a name")
		}
		has[f.name] = true
		if err := k.check(f); err != nil {
			return err
		}
	}
	for _, name := range []string{"prompt_tokens", "completion_tokens"} {
		if !has[name] {
			return column(name, "missing_column", "no such column", tokensKind.expected)
		}
	}
	return nil
}

// DecodeScores reads rows with prompt_tokens and completion_tokens (and, in an
// answer, logprobs and entropy). Other columns are refused by name.
func DecodeScores(r io.Reader, l rollout.Limits) (rows []ScoreRow, err error) {
	defer guard(&err)
	d := &decoder{limits: l}
	in := &stream{r: r, limit: l.MaxBytes}
	err = in.each(checkScores, l.MaxRows, func(n int, columns map[string]*vec) error {
		more, err := d.scores(n, len(rows), columns)
		rows = append(rows, more...)
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(rows) == 0 {
		return nil, &fault.Error{Kind: fault.Invalid, Code: "empty_batch", Msg: "the stream has no rows"}
	}
	return rows, nil
}

func (d *decoder) scores(n, base int, columns map[string]*vec) ([]ScoreRow, error) {
	prompt, completion := columns["prompt_tokens"], columns["completion_tokens"]
	total, predicted := 0, 0
	for i := range n {
		row := base + i
		p, err := d.list(prompt, "prompt_tokens", i, row, d.limits.MaxPromptTokens)
		if err != nil {
			return nil, err
		}
		c, err := d.list(completion, "completion_tokens", i, row, d.limits.MaxCompletionTokens)
		if err != nil {
			return nil, err
		}
		if err := d.count(p, c, row); err != nil {
			return nil, err
		}
		total += p + c
		predicted += c
	}
	rows := make([]ScoreRow, n)
	back := make([]int32, total)
	for i := range rows {
		for _, x := range []struct {
			name string
			a    *vec
			to   *[]int32
		}{{"prompt_tokens", prompt, &rows[i].Prompt}, {"completion_tokens", completion, &rows[i].Completion}} {
			lo, hi := x.a.span(i)
			*x.to, back = back[:hi-lo:hi-lo], back[hi-lo:]
			if err := d.copyTokens(*x.to, x.a.child, lo, x.name, base+i); err != nil {
				return nil, err
			}
		}
	}
	for _, x := range []struct {
		name string
		to   func(r *ScoreRow) *[]float32
	}{{"logprobs", func(r *ScoreRow) *[]float32 { return &r.LogProbs }}, {"entropy", func(r *ScoreRow) *[]float32 { return &r.Entropy }}} {
		a := columns[x.name]
		if a == nil {
			continue
		}
		back := make([]float32, predicted)
		for i := range rows {
			lo, n, err := beside(a, x.name, len(rows[i].Completion), i, base+i)
			if err != nil {
				return nil, err
			}
			if a.null(i) {
				return nil, fault.BadRow(x.name, base+i, "null", "a value for each completion token")
			}
			dst := back[:n:n]
			back = back[n:]
			for t := range dst {
				dst[t] = float32(a.child.float(lo + t))
				if a.child.null(lo+t) || !finite(float64(dst[t])) {
					return nil, fault.BadRow(x.name, base+i, describe(a.child, lo+t, t), "a finite number")
				}
			}
			*x.to(&rows[i]) = dst
		}
	}
	return rows, nil
}

// EncodeScores writes rows with columns prompt_tokens, completion_tokens, logprobs, entropy.
// The last two are left out when no row has them.
func EncodeScores(w io.Writer, rows []ScoreRow) error {
	n := len(rows)
	c := &columns{rows: n}
	c.add("prompt_tokens", tokenList, lists[int32, *array.Int32Builder](n, func(i int) ([]int32, bool) { return rows[i].Prompt, true }))
	c.add("completion_tokens", tokenList, lists[int32, *array.Int32Builder](n, func(i int) ([]int32, bool) { return rows[i].Completion, true }))
	for _, x := range []struct {
		name string
		of   func(i int) []float32
	}{{"logprobs", func(i int) []float32 { return rows[i].LogProbs }}, {"entropy", func(i int) []float32 { return rows[i].Entropy }}} {
		one := false
		for i := range rows {
			v := x.of(i)
			one = one || v != nil
			if v != nil && len(v) != len(rows[i].Completion) {
				return fault.BadRow(x.name, i, fmt.Sprintf("%d values", len(v)), fmt.Sprint(len(rows[i].Completion)))
			}
		}
		if one {
			c.add(x.name, floatList, lists[float32, *array.Float32Builder](n, func(i int) ([]float32, bool) { return x.of(i), x.of(i) != nil }))
		}
	}
	return c.write(w, "")
}
