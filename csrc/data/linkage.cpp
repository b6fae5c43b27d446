// Complete-linkage clustering, bottom up, of points joined by a neighbor graph: reciprocal nearest clusters are merged
// in rounds. A merge needs an edge between the clusters, its height is the largest distance of all their pairs: where
// the graph lacks a pair it is computed. So the diameter of a cluster never passes the height of its last merge.
#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "data.h"

namespace py = pybind11;

namespace effkern {
namespace {

struct Link {
  int64_t to;
  double distance;
};

class Linkage {
 public:
  Linkage(const float* points, int64_t num, int64_t dim, const int64_t* neighbors, int64_t degree, double most)
      : points_(points), dim_(dim), most_(most), members_(num), links_(num), nearest_(num, -1) {
    for (int64_t i = 0; i < num; ++i) {
      members_[i].push_back(i);
      for (int64_t j = 0; j < degree; ++j) {
        const int64_t other = neighbors[i * degree + j];
        if (other < 0 || other == i) continue;
        const double distance = between(i, other);
        if (!(distance <= most_)) continue;
        links_[i].push_back({other, distance});
        links_[other].push_back({i, distance});
      }
    }
    for (auto& links : links_) {
      std::sort(links.begin(), links.end(), [](const Link& a, const Link& b) { return a.to < b.to; });
      links.erase(std::unique(links.begin(), links.end(), [](const Link& a, const Link& b) { return a.to == b.to; }),
                  links.end());
    }
  }

  void run() {
    std::vector<int64_t> active(links_.size()), changed;
    for (size_t i = 0; i < active.size(); ++i) active[i] = static_cast<int64_t>(i);
    changed = active;
    while (!changed.empty()) {
      for (const int64_t i : changed) nearest_[i] = nearest_of(i);
      changed.clear();
      active.erase(std::remove_if(active.begin(), active.end(), [&](int64_t i) { return nearest_[i] < 0; }),
                   active.end());
      std::vector<int64_t> firsts;
      for (const int64_t a : active)
        if (nearest_[a] > a && nearest_[nearest_[a]] == a) firsts.push_back(a);
      for (const int64_t a : firsts) merge(a, nearest_[a], changed);
      std::sort(changed.begin(), changed.end());
      changed.erase(std::unique(changed.begin(), changed.end()), changed.end());
    }
  }

  std::vector<int64_t> firsts, seconds;
  std::vector<double> heights;

 private:
  double between(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t d = 0; d < dim_; ++d) {
      const double difference = static_cast<double>(points_[i * dim_ + d]) - points_[j * dim_ + d];
      sum += difference * difference;
    }
    return sum;
  }

  // The largest distance of a pair; anything above the limit as soon as one is.
  double farthest(int64_t a, int64_t b) const {
    double largest = 0;
    for (const int64_t i : members_[a])
      for (const int64_t j : members_[b]) {
        largest = std::max(largest, between(i, j));
        if (largest > most_) return largest;
      }
    return largest;
  }

  // Ties by the pair's numbers, so that some pair is always reciprocal.
  int64_t nearest_of(int64_t a) const {
    int64_t best = -1;
    double distance = 0;
    for (const Link& link : links_[a]) {
      const bool tie = best >= 0 && link.distance == distance;
      const auto pair = std::minmax(a, link.to), old = std::minmax(a, best);
      if (best < 0 || link.distance < distance || (tie && pair < old)) {
        best = link.to;
        distance = link.distance;
      }
    }
    return best;
  }

  static std::vector<Link>::iterator find(std::vector<Link>& links, int64_t to) {
    return std::lower_bound(links.begin(), links.end(), to, [](const Link& x, int64_t id) { return x.to < id; });
  }

  static void remove(std::vector<Link>& links, int64_t to) {
    const auto at = find(links, to);
    if (at != links.end() && at->to == to) links.erase(at);
  }

  // b goes into a < b.
  void merge(int64_t a, int64_t b, std::vector<int64_t>& changed) {
    firsts.push_back(a);
    seconds.push_back(b);
    heights.push_back(find(links_[a], b)->distance);
    std::vector<Link> joined;
    auto x = links_[a].begin(), y = links_[b].begin();
    while (x != links_[a].end() || y != links_[b].end()) {
      const bool in_a = y == links_[b].end() || (x != links_[a].end() && x->to <= y->to);
      const bool in_b = x == links_[a].end() || (y != links_[b].end() && y->to <= x->to);
      const int64_t c = in_a ? x->to : y->to;
      if (c != a && c != b) {
        const double of_a = in_a ? x->distance : farthest(a, c), of_b = in_b ? y->distance : farthest(b, c);
        const double distance = std::max(of_a, of_b);
        remove(links_[c], a);
        remove(links_[c], b);
        if (distance <= most_) {
          joined.push_back({c, distance});
          links_[c].insert(find(links_[c], a), {a, distance});
        }
        changed.push_back(c);
      }
      if (in_a) ++x;
      if (in_b) ++y;
    }
    links_[a] = std::move(joined);
    links_[b] = {};
    nearest_[b] = -1;
    members_[a].insert(members_[a].end(), members_[b].begin(), members_[b].end());
    members_[b] = {};
    changed.push_back(a);
  }

  const float* points_;
  int64_t dim_;
  double most_;
  std::vector<std::vector<int64_t>> members_;
  std::vector<std::vector<Link>> links_;
  std::vector<int64_t> nearest_;
};

py::tuple complete_linkage(const py::array_t<float, py::array::c_style>& points,
                           const py::array_t<int64_t, py::array::c_style>& neighbors, double most) {
  if (points.ndim() != 2 || neighbors.ndim() != 2 || points.shape(0) != neighbors.shape(0)) {
    throw py::value_error("complete_linkage: points and neighbors must be [N, D] and [N, k]");
  }
  const int64_t num = points.shape(0), degree = neighbors.shape(1);
  for (int64_t i = 0; i < num * degree; ++i) {
    if (neighbors.data()[i] >= num) {
      throw py::value_error("complete_linkage: neighbors must be below " + std::to_string(num) + ", got " +
                            std::to_string(neighbors.data()[i]));
    }
  }
  std::vector<int64_t> firsts, seconds;
  std::vector<double> heights;
  {
    const py::gil_scoped_release release;
    Linkage linkage(points.data(), num, points.shape(1), neighbors.data(), degree, most);
    linkage.run();
    firsts = std::move(linkage.firsts);
    seconds = std::move(linkage.seconds);
    heights = std::move(linkage.heights);
  }
  const auto count = static_cast<py::ssize_t>(heights.size());
  return py::make_tuple(py::array_t<int64_t>(count, firsts.data()), py::array_t<int64_t>(count, seconds.data()),
                        py::array_t<double>(count, heights.data()));
}

}  // namespace

void bind_linkage(py::module_& module) {
  module.def("complete_linkage", &complete_linkage, py::arg("points").noconvert(), py::arg("neighbors").noconvert(),
             py::arg("most"), "Merges (first, second, height) in the order in which they were made.");
}

}  // namespace effkern
