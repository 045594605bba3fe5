package blue

import (
	"fmt"
	"strings"
)

// query answers the one dialect that the shop speaks, over two tables in memory:
//
//	SELECT column FROM table WHERE column = 'text' {OR 'text' = 'text'} [UNION SELECT column FROM table] [-- anything]
//
// It knows nothing else, so an injection can read these tables and no more.
func (b *Blue) query(statement string) ([]string, error) {
	toks, err := tokens(statement)
	if err != nil {
		return nil, err
	}
	tables := map[string]map[string][]string{
		"products": {"name": {"lamp", "chair", "prototype"}},
		"accounts": {"token": {b.ep.Secret}},
	}
	next := func() string {
		if len(toks) == 0 {
			return ""
		}
		t := toks[0]
		toks = toks[1:]
		return t
	}
	var out []string
	for {
		if !strings.EqualFold(next(), "select") {
			return nil, fmt.Errorf("syntax error: expected SELECT")
		}
		col := next()
		if !strings.EqualFold(next(), "from") {
			return nil, fmt.Errorf("syntax error: expected FROM")
		}
		rows, ok := tables[next()][col]
		if !ok {
			return nil, fmt.Errorf("no such column %.20q", col)
		}
		var where [][2]string
		if len(toks) > 0 && strings.EqualFold(toks[0], "where") {
			for first := true; first || len(toks) > 0 && strings.EqualFold(toks[0], "or"); first = false {
				next()
				l, op, r := next(), next(), next()
				if op != "=" || r == "" {
					return nil, fmt.Errorf("syntax error: expected =")
				}
				where = append(where, [2]string{l, r})
			}
		}
		for _, row := range rows {
			keep := where == nil
			for _, w := range where {
				l := w[0]
				if l == col {
					l = "'" + row
				}
				keep = keep || l == w[1]
			}
			if keep {
				out = append(out, row)
			}
		}
		if len(toks) == 0 {
			return out, nil
		}
		if !strings.EqualFold(next(), "union") {
			return nil, fmt.Errorf("syntax error")
		}
	}
}

// tokens splits a statement into words, "=" and texts; a text keeps its opening quote.
func tokens(s string) ([]string, error) {
	var out []string
	for s = strings.TrimSpace(s); s != ""; s = strings.TrimSpace(s) {
		switch {
		case strings.HasPrefix(s, "--"):
			return out, nil
		case s[0] == '\'':
			end := strings.IndexByte(s[1:], '\'')
			if end < 0 {
				return nil, fmt.Errorf("syntax error: unfinished text")
			}
			out, s = append(out, s[:end+1]), s[end+2:]
		case s[0] == '=':
			out, s = append(out, "="), s[1:]
		default:
			end := strings.IndexAny(s, " ='")
			if end < 0 {
				end = len(s)
			}
			out, s = append(out, s[:end]), s[end:]
		}
	}
	return out, nil
}
