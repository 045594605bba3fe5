package arrowio

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"slices"
	"unicode/utf8"

	"trainerd/internal/fault"
	"trainerd/rollout"
)

// ContentType is the media type of an Arrow IPC stream.
const ContentType = "application/vnd.apache.arrow.stream"

// maxID bounds group_id and rollout_id in bytes.
const maxID = 1024

// maxLogProb is the greatest log-prob that passes for 0. A float32 log-softmax
// subtracts numbers of the size of the logits: at |logit| up to 2^13 their spacing is 2^-10.
const maxLogProb = 1.0 / 1024

// Decode reads one IPC stream (plain, LZ4 or ZSTD buffers) into a batch. Every
// error is a fault that names column and row; a limit that does not hold is
// found before memory is allocated for what exceeds it. It never panics.
func Decode(r io.Reader, s rollout.Schema, l rollout.Limits) (*rollout.Batch, error) {
	return decode(&stream{r: r, limit: l.MaxBytes}, s, l)
}

// DecodeBytes is Decode of a body that is in memory; it reads it in place. The
// batch does not refer to data.
func DecodeBytes(data []byte, s rollout.Schema, l rollout.Limits) (*rollout.Batch, error) {
	return decode(&stream{data: data, limit: l.MaxBytes}, s, l)
}

func decode(in *stream, s rollout.Schema, l rollout.Limits) (*rollout.Batch, error) {
	d := newDecoder(s, l)
	if err := d.decode(in); err != nil {
		return nil, err
	}
	return d.batch, nil
}

func newDecoder(s rollout.Schema, l rollout.Limits) *decoder {
	return &decoder{schema: s, limits: l, batch: &rollout.Batch{}, groups: map[string]*group{}}
}

func (d *decoder) decode(in *stream) (err error) {
	defer guard(&err)
	check := func(fields []field) (err error) {
		d.batch.Components, err = checkRollouts(fields, d.schema)
		d.batch.HasReward = slices.ContainsFunc(fields, func(f field) bool { return f.name == "reward" })
		return err
	}
	if err := in.each(check, d.limits.MaxRows, d.add); err != nil {
		return err
	}
	if len(d.batch.Rollouts) == 0 {
		return &fault.Error{Kind: fault.Invalid, Code: "empty_batch", Msg: "the stream has no rows"}
	}
	return nil
}

// guard turns a panic of a decoder into a fault. The checks leave none to catch
// that is known: tests count this code as a failure.
func guard(err *error) {
	if p := recover(); p != nil {
		*err = fault.New(fault.Malformed, codePanic, "decode arrow stream: %v", p)
	}
}

const codePanic = "malformed_arrow_unforeseen"

// each reads a stream: its schema, which check may refuse, then its record
// batches as columns by name.
func (s *stream) each(check func([]field) error, maxRows int, add func(rows int, columns map[string]*vec) error) error {
	s.dicts = map[int64]*dictionary{}
	msg, err := s.message()
	if err != nil {
		return err
	}
	if msg == nil || msg.kind != messageSchema || len(msg.body) > 0 {
		return malformed("the stream does not begin with a schema")
	}
	fields, err := readSchema(msg.header)
	if err != nil {
		return err
	}
	if err := check(fields); err != nil {
		return err
	}
	dictType := func(id int64) *dtype {
		for _, f := range fields {
			if f.typ.dict && f.typ.dictID == id {
				return f.typ
			}
		}
		return nil
	}
	total := 0
	for {
		msg, err := s.message()
		if msg == nil || err != nil {
			return err
		}
		switch msg.kind {
		case messageDictionary:
			err = s.readDictionary(msg.header, msg.body, dictType)
		case messageRecords:
			var r *records
			if r, err = s.records(msg.header, msg.body); err != nil {
				return err
			}
			if r.length > int64(maxRows-total) {
				return &fault.Error{Kind: fault.TooLarge, Code: "too_many_rows", Msg: fmt.Sprintf("the stream has more than %d rows", maxRows)}
			}
			total += int(r.length)
			columns := make(map[string]*vec, len(fields))
			for _, f := range fields {
				a, err := r.load(f.typ)
				if err != nil {
					return fmt.Errorf("column %q: %w", clip(f.name), err)
				}
				if int64(a.n) != r.length {
					return malformed("column %q has %d rows of %d", clip(f.name), a.n, r.length)
				}
				columns[f.name] = a
			}
			if r.nNodes > 0 || r.nBufs > 0 {
				return malformed("a record batch has more arrays than its schema")
			}
			err = add(int(r.length), columns)
		default:
			err = malformed("a message of kind %d", msg.kind)
		}
		if err != nil {
			return err
		}
	}
}

// decoder collects the rows of a stream.
type decoder struct {
	schema rollout.Schema
	limits rollout.Limits
	batch  *rollout.Batch
	tokens int64
	groups map[string]*group

	inPlace bool  // rows may refer to the stream's bytes
	shared  int64 // bytes that they refer to
}

// group is the prompt that the first row of a group brought.
type group struct {
	id     string
	prompt []int32
	raw    []byte // of the prompt in the current record batch; nil before its first row there
	row    int    // the first one, of the whole stream
	batch  int    // where the record batch of raw begins
}

// add decodes and checks the rows of one record batch: first ids and lengths of
// all rows, then one allocation per kind of value, then the values.
func (d *decoder) add(n int, columns map[string]*vec) error {
	base := len(d.batch.Rollouts)
	d.batch.Rollouts = slices.Grow(d.batch.Rollouts, n)
	rows := d.batch.Rollouts[base : base+n]
	groups := make([]*group, n)
	promptTokens, completionTokens, err := d.shapes(rows, groups, base, columns)
	if err != nil {
		return err
	}
	if err := d.prompts(rows, groups, base, columns["prompt_tokens"], promptTokens); err != nil {
		return err
	}
	if err := d.completions(rows, base, columns["completion_tokens"], completionTokens); err != nil {
		return err
	}
	if err := d.perToken(rows, base, columns, completionTokens); err != nil {
		return err
	}
	if err := d.scalars(rows, base, columns); err != nil {
		return err
	}
	d.batch.Rollouts = d.batch.Rollouts[:base+n]
	return nil
}

// shapes checks ids and lengths, and returns how many tokens prompts (of groups
// that are new here) and completions have.
func (d *decoder) shapes(rows []rollout.Rollout, groups []*group, base int, columns map[string]*vec) (prompts, completions int, err error) {
	id, prompt, completion := columns["group_id"], columns["prompt_tokens"], columns["completion_tokens"]
	for i := range rows {
		row := base + i
		name, err := text(id, "group_id", i, row)
		if err != nil {
			return 0, 0, err
		}
		if len(name) == 0 {
			return 0, 0, fault.BadRow("group_id", row, "none", "a name")
		}
		p, err := d.list(prompt, "prompt_tokens", i, row, d.limits.MaxPromptTokens)
		if err != nil {
			return 0, 0, err
		}
		c, err := d.list(completion, "completion_tokens", i, row, d.limits.MaxCompletionTokens)
		if err != nil {
			return 0, 0, err
		}
		if err := d.count(p, c, row); err != nil {
			return 0, 0, err
		}
		g := d.groups[string(name)]
		if g == nil {
			g = &group{id: string(name), row: row, batch: base}
			d.groups[g.id] = g
			prompts += p
		} else if g.batch != base {
			g.raw, g.batch = nil, base // its bytes went with an earlier message
		}
		groups[i] = g
		completions += c
	}
	return prompts, completions, nil
}

// list checks that a list of tokens is there, not empty and not longer than limit.
func (d *decoder) list(a *vec, name string, i, row, limit int) (n int, err error) {
	if a.null(i) {
		return 0, fault.BadRow(name, row, "null", "token ids")
	}
	lo, hi := a.span(i)
	if lo == hi {
		return 0, fault.BadRow(name, row, "an empty list", "at least one token")
	}
	if hi-lo > limit {
		return 0, fault.BadRow(name, row, fmt.Sprintf("%d tokens", hi-lo), fmt.Sprintf("at most %d", limit))
	}
	return hi - lo, nil
}

// count enters a row's tokens and holds the limits of the row and of the stream.
func (d *decoder) count(prompt, completion, row int) error {
	if n := prompt + completion; d.limits.MaxSequence > 0 && n > d.limits.MaxSequence {
		return fault.BadRow("completion_tokens", row, fmt.Sprintf("%d tokens with the prompt", n), fmt.Sprintf("at most %d", d.limits.MaxSequence))
	}
	if d.tokens += int64(prompt + completion); d.tokens > d.limits.MaxTokens {
		return &fault.Error{Kind: fault.TooLarge, Code: "too_many_tokens", Msg: fmt.Sprintf("the stream has more than %d tokens", d.limits.MaxTokens),
			Fields: []fault.Field{{Name: "completion_tokens", Row: row}}}
	}
	return nil
}

// text is an id of a row: nil when null.
func text(a *vec, name string, i, row int) ([]byte, error) {
	if a.null(i) {
		return nil, nil
	}
	b, null, err := a.text(i)
	switch {
	case err != nil || null:
		return nil, err
	case len(b) > maxID:
		return nil, fault.BadRow(name, row, fmt.Sprintf("%d bytes", len(b)), fmt.Sprintf("at most %d", maxID))
	case !utf8.Valid(b):
		return nil, fault.BadRow(name, row, "bytes that are not UTF-8", "UTF-8")
	}
	return b, nil
}

// prompts decodes the prompt of each group once and compares the others with it.
func (d *decoder) prompts(rows []rollout.Rollout, groups []*group, base int, a *vec, tokens int) error {
	values := a.child
	back := make([]int32, tokens)
	var scratch []int32
	for i := range rows {
		g, row := groups[i], base+i
		rows[i].GroupID = g.id
		lo, hi := a.span(i)
		raw := values.raw(lo, hi)
		if g.raw != nil && values.valid == nil && bytes.Equal(g.raw, raw) {
			rows[i].Prompt = g.prompt
			continue
		}
		dst := back
		if g.prompt != nil {
			scratch = slices.Grow(scratch[:0], hi-lo)[:hi-lo]
			dst = scratch
		}
		dst = dst[: hi-lo : hi-lo]
		if err := d.copyTokens(dst, values, lo, "prompt_tokens", row); err != nil {
			return err
		}
		if g.prompt == nil {
			g.prompt, back = dst, back[hi-lo:]
		} else if !slices.Equal(g.prompt, dst) {
			return &fault.Error{Kind: fault.Invalid, Code: "unequal_prompts", Fields: []fault.Field{{Name: "prompt_tokens", Row: row,
				Got: rollout.DescribePrompt(dst, g.prompt), Expected: fmt.Sprintf("the prompt of group %q as in row %d", g.id, g.row)}}}
		}
		g.raw = raw
		rows[i].Prompt = g.prompt
	}
	return nil
}

func (d *decoder) completions(rows []rollout.Rollout, base int, a *vec, tokens int) error {
	var back []int32
	share := d.shares(a.child, tokens) && d.limits.Vocab >= 1 && d.limits.Vocab <= math.MaxInt32
	if !share {
		back = make([]int32, tokens)
	}
	for i := range rows {
		lo, hi := a.span(i)
		if share {
			raw := a.child.raw(lo, hi)
			if tokensFit(raw, d.limits.Vocab) {
				rows[i].Completion = view[int32](raw)
				d.shared += int64(len(raw))
				continue
			}
			back = make([]int32, hi-lo) // for the error's sake
		}
		dst := back[: hi-lo : hi-lo]
		back = back[hi-lo:]
		if err := d.copyTokens(dst, a.child, lo, "completion_tokens", base+i); err != nil {
			return err
		}
		rows[i].Completion = dst
	}
	return nil
}

func (d *decoder) copyTokens(dst []int32, values *vec, lo int, name string, row int) error {
	if values.valid != nil {
		for i := range dst {
			if values.null(lo + i) {
				return fault.BadRow(name, row, fmt.Sprintf("null at %d", i), "a token id")
			}
		}
	}
	if i := values.tokens(dst, lo, d.limits.Vocab); i >= 0 {
		return &fault.Error{Kind: fault.Invalid, Code: "token_out_of_range", Fields: []fault.Field{{Name: name, Row: row,
			Got: fmt.Sprintf("token %d at %d", values.int(lo+i), i), Expected: fmt.Sprintf("a token in [0, %d)", d.limits.Vocab)}}}
	}
	return nil
}

// perToken decodes the columns that have a value for each completion token.
func (d *decoder) perToken(rows []rollout.Rollout, base int, columns map[string]*vec, tokens int) error {
	if a := columns["loss_mask"]; a != nil {
		back := make([]bool, tokens)
		for i := range rows {
			lo, n, err := beside(a, "loss_mask", len(rows[i].Completion), i, base+i)
			if err != nil {
				return err
			}
			if a.null(i) {
				continue // like an absent column
			}
			dst := back[:n:n]
			back = back[n:]
			for t := range dst {
				if a.child.null(lo + t) {
					return fault.BadRow("loss_mask", base+i, fmt.Sprintf("null at %d", t), "true or false")
				}
				dst[t] = a.child.bool(lo + t)
			}
			rows[i].LossMask = dst
		}
	}
	if a := columns["sampler_logprobs"]; a != nil {
		var back []float32
		share := d.shares(a.child, tokens) && columns["loss_mask"] == nil
		if !share {
			back = make([]float32, tokens)
		}
		for i := range rows {
			lo, n, err := beside(a, "sampler_logprobs", len(rows[i].Completion), i, base+i)
			if err != nil {
				return err
			}
			if a.null(i) {
				return fault.BadRow("sampler_logprobs", base+i, "null", "a log-prob for each completion token")
			}
			if share {
				raw := a.child.raw(lo, lo+n)
				if logProbsFit(raw) {
					rows[i].SamplerLogProbs = view[float32](raw)
					d.shared += int64(len(raw))
					continue
				}
				back = make([]float32, n) // for the error's sake
			}
			dst := back[:n:n]
			back = back[n:]
			rows[i].SamplerLogProbs = dst
			mask := rows[i].LossMask
			if mask == nil && a.child.logProbs(dst, lo) {
				continue
			}
			for t := range dst {
				if mask != nil && !mask[t] {
					continue // 0, whatever is there
				}
				v := float32(a.child.float(lo + t))
				if a.child.null(lo+t) || !(v <= maxLogProb) || math.IsInf(float64(v), 0) {
					return fault.BadRow("sampler_logprobs", base+i, describe(a.child, lo+t, t), "a finite log-prob, at most 0")
				}
				dst[t] = v
			}
		}
	}
	if a := columns["loss_weights"]; a != nil {
		back := make([]float32, tokens)
		for i := range rows {
			lo, n, err := beside(a, "loss_weights", len(rows[i].Completion), i, base+i)
			if err != nil {
				return err
			}
			if a.null(i) {
				continue // like an absent column
			}
			dst := back[:n:n]
			back = back[n:]
			for t := range dst {
				v := float32(a.child.float(lo + t))
				if a.child.null(lo+t) || !(v >= 0) || math.IsInf(float64(v), 0) {
					return fault.BadRow("loss_weights", base+i, describe(a.child, lo+t, t), "a finite weight, at least 0")
				}
				dst[t] = v
			}
			rows[i].LossWeights = dst
		}
	}
	return nil
}

// beside checks that a list is as long as the completion.
func beside(a *vec, name string, want, i, row int) (lo, n int, err error) {
	if a.null(i) {
		return 0, 0, nil
	}
	lo, hi := a.span(i)
	if hi-lo != want {
		return 0, 0, fault.BadRow(name, row, fmt.Sprintf("%d values", hi-lo), fmt.Sprintf("%d, one for each completion token", want))
	}
	return lo, hi - lo, nil
}

func describe(a *vec, i, t int) string {
	if a.null(i) {
		return fmt.Sprintf("null at %d", t)
	}
	return fmt.Sprintf("%v at %d", a.float(i), t)
}

// scalars decodes the columns that have one value for each row.
func (d *decoder) scalars(rows []rollout.Rollout, base int, columns map[string]*vec) error {
	names := d.batch.Components
	back := make([]float64, len(rows)*len(names))
	reward, steps, truncated, ids := columns["reward"], columns["policy_step"], columns["truncated"], columns["rollout_id"]
	components := make([]*vec, len(names))
	for k, name := range names {
		components[k] = columns[componentPrefix+name]
	}
	for i := range rows {
		r, row := &rows[i], base+i
		r.PolicyStep = rollout.NoPolicyStep
		if reward != nil {
			if reward.null(i) {
				return fault.BadRow("reward", row, "null", "a finite number")
			}
			if r.Reward = reward.float(i); !finite(r.Reward) {
				return fault.BadRow("reward", row, r.Reward, "a finite number")
			}
		}
		if names != nil {
			r.Components = back[:len(names):len(names)]
			back = back[len(names):]
			for k, a := range components {
				if a.null(i) {
					continue // 0
				}
				if r.Components[k] = a.float(i); !finite(r.Components[k]) {
					return fault.BadRow(componentPrefix+names[k], row, r.Components[k], "a finite number or null")
				}
			}
			if r.Reward = rollout.ComposeReward(d.schema.RewardWeights, names, r.Components); !finite(r.Reward) {
				return fault.BadRow(componentPrefix+names[0], row, r.Reward, "components whose weighted sum is finite")
			}
		}
		if steps != nil && !steps.null(i) {
			if r.PolicyStep = steps.int(i); r.PolicyStep < 0 {
				return fault.BadRow("policy_step", row, r.PolicyStep, "a step, at least 0, or null")
			}
		}
		if truncated != nil && !truncated.null(i) {
			r.Truncated = truncated.bool(i)
		}
		if ids != nil {
			id, err := text(ids, "rollout_id", i, row)
			if err != nil {
				return err
			}
			r.ID = string(id)
		}
	}
	return nil
}

func finite(v float64) bool { return !math.IsNaN(v) && !math.IsInf(v, 0) }
