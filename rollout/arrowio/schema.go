package arrowio

import (
	"fmt"
	"slices"
	"strings"

	"trainerd/internal/fault"
	"trainerd/rollout"
)

// schemaKey is the schema metadata that names the version of the column set.
const (
	schemaKey     = "trainerd.schema"
	schemaVersion = "1"
)

// maxColumns bounds a schema; a batch has a dozen columns and its components.
const maxColumns = 256

// class is what a column's values are, whatever their width.
type class uint8

const (
	otherClass class = iota
	textClass
	intClass
	floatClass
	boolClass
	listClass
)

// Type ids of the Arrow format (Schema.fbs).
const (
	typeInt           = 2
	typeFloat         = 3
	typeUtf8          = 5
	typeBool          = 6
	typeList          = 12
	typeFixedSizeList = 16
	typeLargeUtf8     = 20
	typeLargeList     = 21
)

var typeNames = map[int]string{1: "null", 4: "binary", 7: "decimal", 8: "date", 9: "time", 10: "timestamp", 11: "interval", 13: "struct",
	14: "union", 15: "fixed_size_binary", 17: "map", 18: "duration", 19: "large_binary", 22: "run_end_encoded", 23: "binary_view",
	24: "utf8_view", 25: "list_view", 26: "large_list_view"}

// dtype is the type of a column or of a list's elements.
type dtype struct {
	class  class
	name   string // as people write it
	bits   int    // of an int or float
	signed bool
	large  bool // 64-bit offsets
	fixed  int  // elements of each list; -1: by offsets
	elem   *dtype
	dict   bool // text by index into dictionary id
	dictID int64
	index  *dtype
}

type field struct {
	name string
	typ  *dtype
}

// kind is a shape that a known column must have.
type kind struct {
	class, elem class
	expected    string
}

var (
	textKind   = kind{textClass, otherClass, "utf8"}
	tokensKind = kind{listClass, intClass, "list<int32>"}
	floatsKind = kind{listClass, floatClass, "list<float32>"}
	boolsKind  = kind{listClass, boolClass, "list<bool>"}
	floatKind  = kind{floatClass, otherClass, "float32 or float64"}
	intKind    = kind{intClass, otherClass, "int64"}
	boolKind   = kind{boolClass, otherClass, "bool"}
)

func (k kind) check(f field) error {
	t := f.typ
	if t.class == k.class && (k.class != listClass || t.elem.class == k.elem && !t.elem.dict) {
		return nil
	}
	return &fault.Error{Kind: fault.Invalid, Code: "wrong_type", Fields: []fault.Field{{Name: f.name, Row: -1, Got: t.name, Expected: k.expected}}}
}

// rolloutKinds are the columns of a batch besides reward_<name>.
var rolloutKinds = map[string]kind{
	"group_id": textKind, "prompt_tokens": tokensKind, "completion_tokens": tokensKind, "reward": floatKind,
	"sampler_logprobs": floatsKind, "loss_mask": boolsKind, "loss_weights": floatsKind, "policy_step": intKind,
	"truncated": boolKind, "rollout_id": textKind,
}

const componentPrefix = "reward_"

// checkRollouts holds a schema to the columns of a job. It returns the component
// names, sorted.
func checkRollouts(fields []field, s rollout.Schema) (components []string, err error) {
	has := map[string]bool{}
	for _, f := range fields {
		if has[f.name] {
			return nil, column(f.name, "duplicate_column", "the column twice", "one column of a name")
		}
		has[f.name] = true
		if k, ok := rolloutKinds[f.name]; ok {
			if err := k.check(f); err != nil {
				return nil, err
			}
			continue
		}
		if f.name == "advantages" || f.name == "ref_logprobs" || strings.HasPrefix(f.name, "meta_") {
			return nil, column(f.name, "reserved_column", "a reserved column", "no column of this name: it is reserved for a later version")
		}
		name, ok := strings.CutPrefix(f.name, componentPrefix)
		if !ok || name == "" {
			return nil, column(f.name, "unknown_column", "an unknown column", "one of "+strings.Join(rolloutColumns(), ", "))
		}
		if _, ok := s.RewardWeights[name]; !ok && !s.AnyComponent {
			return nil, column(f.name, "unknown_component", "a component without a weight", "a component that objective.reward_weights names")
		}
		if err := floatKind.check(f); err != nil {
			return nil, err
		}
		components = append(components, name)
	}
	slices.Sort(components)
	for _, name := range []string{"group_id", "prompt_tokens", "completion_tokens"} {
		if !has[name] {
			return nil, column(name, "missing_column", "no such column", rolloutKinds[name].expected)
		}
	}
	switch {
	case has["reward"] && components != nil:
		return nil, column("reward", "reward_and_components", "reward beside "+componentPrefix+components[0], "either reward or its components")
	case !has["reward"] && components == nil && s.Objective != rollout.CrossEntropy && s.Objective != "":
		return nil, column("reward", "missing_column", "no such column", "float32 or float64, or components "+componentPrefix+"<name>")
	case has["loss_weights"] && s.Objective != rollout.CrossEntropy && s.Objective != "":
		return nil, column("loss_weights", "unexpected_column", "objective "+s.Objective, "objective "+rollout.CrossEntropy+" with this column")
	case s.SamplerLogProbs && !has["sampler_logprobs"]:
		return nil, column("sampler_logprobs", "missing_column", "no such column", "list<float32>, which this job requires")
	}
	return components, nil
}

func rolloutColumns() []string {
	names := []string{componentPrefix + "<name>"}
	for name := range rolloutKinds {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// column is an Invalid fault about a whole column.
func column(name, code, got, expected string) error {
	return &fault.Error{Kind: fault.Invalid, Code: code, Fields: []fault.Field{{Name: clip(name), Row: -1, Got: got, Expected: expected}}}
}

// clip keeps names that a client made up readable in an error.
func clip(name string) string {
	if len(name) <= 64 {
		return name
	}
	return strings.ToValidUTF8(name[:64], "") + "..."
}

// readSchema reads the schema message.
func readSchema(t table) ([]field, error) {
	if t.int16(0) != 0 {
		return nil, column("endianness", "wrong_type", "big-endian data", "little-endian data")
	}
	if pos, n := t.vector(2, 4); n > 0 {
		for i := range n {
			kv := t.m.table(pos + 4*i)
			if v := kv.text(1); kv.text(0) == schemaKey && v != schemaVersion && !t.m.bad {
				return nil, column(schemaKey, "schema_version", fmt.Sprintf("%q", clip(v)), fmt.Sprintf("%q", schemaVersion))
			}
		}
	}
	pos, n := t.vector(1, 4)
	if n > maxColumns {
		return nil, fault.New(fault.TooLarge, "too_many_columns", "%d columns, expected at most %d", n, maxColumns)
	}
	fields := make([]field, n)
	for i := range fields {
		f := t.m.table(pos + 4*i)
		fields[i] = field{name: f.text(0), typ: readType(f, 0)}
	}
	if t.m.bad {
		return nil, malformed("read schema: an offset leads outside the message")
	}
	return fields, nil
}

// readType reads the type of a field. No column is deeper than a list of values.
func readType(f table, depth int) *dtype {
	id := f.byte(2)
	body, _ := f.child(3)
	d := &dtype{fixed: -1}
	switch id {
	case typeInt:
		readInt(d, body)
	case typeFloat:
		precision := body.int16(0) // half, single, double
		if precision < 0 || precision > 2 {
			f.m.bad = true
			return d
		}
		d.class, d.bits = floatClass, 16<<precision
		d.name = fmt.Sprintf("float%d", d.bits)
	case typeUtf8:
		d.class, d.name = textClass, "utf8"
	case typeLargeUtf8:
		d.class, d.name, d.large = textClass, "large_utf8", true
	case typeBool:
		d.class, d.name = boolClass, "bool"
	case typeList, typeLargeList, typeFixedSizeList:
		pos, n := f.vector(5, 4)
		if n != 1 {
			f.m.bad = true
			return d
		}
		if depth == 1 {
			d.name = "list"
			return d
		}
		d.class, d.elem = listClass, readType(f.m.table(pos), depth+1)
		d.name = "list<" + d.elem.name + ">"
		switch id {
		case typeLargeList:
			d.large, d.name = true, "large_"+d.name
		case typeFixedSizeList:
			d.fixed = body.int32(0)
			d.name = fmt.Sprintf("fixed_size_list<%s, %d>", d.elem.name, d.fixed)
			if d.fixed < 0 {
				f.m.bad = true
			}
		}
	default:
		d.name = typeNames[id]
		if d.name == "" {
			d.name = fmt.Sprintf("type %d", id)
		}
	}
	if enc, ok := f.child(4); ok {
		d.dict, d.dictID, d.index = true, enc.int64(0), &dtype{class: intClass, bits: 32, signed: true, fixed: -1}
		if index, ok := enc.child(1); ok {
			readInt(d.index, index)
		}
		d.name = "dictionary<" + d.name + ">"
		if d.class != textClass {
			d.class = otherClass
		}
	}
	return d
}

func readInt(d *dtype, t table) {
	d.class, d.bits, d.signed = intClass, t.int32(0), t.byte(1) != 0
	d.name = fmt.Sprintf("uint%d", d.bits)
	if d.signed {
		d.name = d.name[1:]
	}
	switch d.bits {
	case 8, 16, 32, 64:
	default:
		t.m.bad = true
	}
}
